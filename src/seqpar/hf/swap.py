"""Swap the decoder stack and the head of one Transformers model for parallel ones, and back.

Only the instance changes: two of its children, two of its methods, one hook. Nothing is assigned in Transformers'
namespaces, and other models of the same class are not affected.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers import __version__ as transformers_version

from seqpar import comm
from seqpar.comm import DeviceMesh, Groups, Wire
from seqpar.hf.agreed import agreed, check_same
from seqpar.hf.attend import Attend, Decode, Home, Prefill, add_cores, check_methods, rope_of
from seqpar.hf.auto import AutoOverlap
from seqpar.hf.backbone import KEEP, LMHead, ParallelBackbone
from seqpar.hf.generation import parallel_generate
from seqpar.hf.methods import method_of
from seqpar.hf.models import check_model, sliding_windows
from seqpar.hf.shift import AutoShift
from seqpar.layers import (
    ExpertPlacement,
    ParallelDecoderLayer,
    ParallelLMHead,
    RMSNorm,
    ShardedModule,
    VocabParallelEmbedding,
    gather_state_dict,
    name_modules,
    sync_gradients,
)
from seqpar.partition import HeadMap, Interleave, Layout, Range, Shift, ThreePhase, layout_names

__all__ = ["LoadReport", "MemoryReport", "Parallelized", "build", "decoder_layers", "parallelize", "shift_rule"]


class LoadReport(NamedTuple):
    """What reading a checkpoint cost this rank.

    Attributes:
        bytes_read: tensor data read from disk.
        weight_bytes: parameters stored.
        num_tensors: tensors of the checkpoint that this rank read a part of.
        seconds: wall time of reading.
    """

    bytes_read: int
    weight_bytes: int
    num_tensors: int
    seconds: float


class MemoryReport(NamedTuple):
    """What a rank of a parallel model holds.

    Attributes:
        weight_bytes: parameters stored.
        layout_bytes: of those, what a step reads under each layout.
        extra_bytes: what layouts store besides; the paper's second model would be `weight_bytes` / sp.
        kv_token_bytes: cached for one token, in all layers and under every layout, where decodes read it.
    """

    weight_bytes: int
    layout_bytes: dict[Layout, int]
    extra_bytes: int
    kv_token_bytes: int


class Parallelized:
    """A model whose stack and head are parallel, until `undo`; as a context manager it undoes itself.

    The model holds this object as `model.seqpar`. The reference back is weak, so that a model that is dropped frees its
    weights at once; inside of a `with` block it is kept.

    Attributes:
        groups: the ranks.
        report: what loading cost; None where the model had its weights already.
    """

    def __init__(
        self, model: PreTrainedModel, groups: Groups, backbone: ParallelBackbone, head: ParallelLMHead
    ) -> None:
        self._model = weakref.ref(model)
        self._kept: PreTrainedModel | None = None
        self.groups = groups
        self.report: LoadReport | None = None
        self._original: tuple[Any, Any] | None = (model.model, model.lm_head)
        swapped = self.model
        swapped.model, swapped.lm_head = backbone, head
        model.train(model.training)
        name_modules(model)
        self._hook = model.register_forward_pre_hook(_hand_down, with_kwargs=True)
        swapped.generate = parallel_generate(model, groups)
        swapped.save_pretrained = _parallel_save(self)
        swapped.seqpar = self

    @property
    def model(self) -> Any:
        """The Transformers model.

        Raises:
            ValueError: it has been dropped.
        """
        model = self._model()
        if model is None:
            raise ValueError("`model` must be kept in a variable while it is parallelized, got one that was dropped")
        return model

    def undo(self) -> None:
        """Put the modules, methods and weights back that the model had; weights trained since stay behind.

        Raises:
            ValueError: the model was loaded by slices and never had whole weights.
        """
        if self._original is None:
            return
        model = self.model
        if any(param.is_meta for module in self._original for param in module.parameters()):
            raise ValueError(
                "`undo` must be called on a model that had its weights, got one read by slices; load it again"
            )
        model.model, model.lm_head = self._original
        model.train(model.training)
        self._original = None
        self._hook.remove()
        del model.generate, model.save_pretrained, model.seqpar

    def sync_gradients(self) -> None:
        """After `backward`, sum the gradients that are partial; see `seqpar.layers.sync_gradients`."""
        sync_gradients(self.model, self.groups)

    def gather_state_dict(self) -> dict[str, Tensor]:
        """The whole model's state dict, on every rank; parameters that are not sharded come as they are here.

        Comm:  one all-gather per sharded tensor; call it on every rank.
        """
        return {**self.model.state_dict(), **gather_state_dict(self.model)}

    def add_layouts(self) -> None:
        """Make the groups of the layouts that `shift` chooses from, once all ranks agree on it.

        Comm:  the groups', when they are made.
        """
        shift = self.model.model.shift
        if shift is not None:
            wanted = None if isinstance(shift, AutoShift) else shift.layouts
            self.model.model.add_layouts(comm.layout_groups(self.groups, wanted))

    def explain_shift(self) -> str:
        """Which layout steps run under and, where that was decided by measurement, why; a table for people."""
        shift = self.model.model.shift
        if isinstance(shift, AutoShift):
            return shift.explain()
        if shift is None:
            return f"off: every step runs under {tuple(self.groups.layout)}"
        spans = (f"from {first} token(s): {tuple(layout)}" for first, layout in shift.spans)
        return f"as given: {', '.join(spans)}"

    def memory(self) -> MemoryReport:
        """What this rank stores, and what its layouts use of it."""
        stored = {param.untyped_storage().data_ptr(): param.nbytes for param in self.model.parameters()}
        used: dict[Layout, int] = {}
        extra: dict[int, int] = {}
        for layout in (layout for layout in self.model.model.layouts if layout is not None):
            tensors = [view for module in self.model.modules() for view in _weights(module, layout)]
            used[layout] = sum(view.nbytes for view in tensors)
            extra |= {
                view.untyped_storage().data_ptr(): view.untyped_storage().nbytes()
                for view in tensors
                if view.untyped_storage().data_ptr() not in stored
            }
        return MemoryReport(self.weight_bytes, used, sum(extra.values()), self.kv_token_bytes)

    def explain_overlap(self) -> str:
        """How steps are cut into chunks and, where that was decided by measurement, why; a table for people."""
        overlap = self.model.model.overlap
        if isinstance(overlap, AutoOverlap):
            return overlap.explain()
        return "off: every step runs whole" if overlap is None else f"as given: {overlap}"

    def explain_decode(self) -> str:
        """Where decodes are computed and, where that was decided by measurement, why; for people."""
        explanation: str = self.model.model.attend.explain()
        return explanation

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that this rank stores."""
        return sum(param.nbytes for param in self.model.parameters())

    @property
    def kv_token_bytes(self) -> int:
        """Bytes that this rank caches for one token, in all layers, where decodes read it.

        Of tokens that are dealt out the average; where either may come, the larger number.
        """
        stack: ParallelBackbone = self.model.model
        homes: dict[Any, tuple[Home, ...]] = {"local": ("heads",), "qship": ("tokens",)}
        places = ("heads", "tokens") if stack.attend.auto is not None else homes[stack.attend.decode]
        return max(stack.cache_spec(home).token_bytes for home in places)

    def __enter__(self) -> Parallelized:
        self._kept = self.model
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.undo()
        finally:
            self._kept = None


def parallelize(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    sequence_sharded: bool = False,
    overlap: Interleave | AutoOverlap | Literal["auto", "off"] = "off",
    pipeline: ThreePhase | None = None,
    wire: Wire | None = None,
    experts: ExpertPlacement = "tp",
    shift: int | Shift | AutoShift | Literal["auto", "off"] = "off",
    prefill: Prefill = "ulysses",
    decode: Decode = "local",
) -> Parallelized:
    """Swap the stack and the head of a model for parallel ones, in place.

    Every rank passes the same model, whole. The parallel modules hold copies of their slices; the original modules are
    kept for `undo`. Where memory does not allow that, `load` reads the slices alone. What is returned does not keep the
    model alive outside of a `with` block: hold on to the model.

    Args:
        model: a Llama, Mistral, Mixtral, Qwen2, Qwen3 or Qwen3-MoE causal LM of Transformers.
        mesh: see `seqpar.init_mesh`.
        sequence_sharded: split activations between the linears over `tp` too: reduce-scatters and all-gathers replace
            the all-reduces, and norms are not repeated (arXiv:2205.05198).
        overlap: cut large steps into chunks whose collectives hide under each other's compute (ISO); the same results,
            up to rounding. Steps below its gate, decodes and steps with gradients run as they are. "auto" decides by
            what the layers and their collectives take on these ranks, measured at the first step above the gate of
            `AutoOverlap`; `explain_overlap` says why.
        pipeline: cut the attention of large steps into parts whose all-to-alls over `sp` hide under each other's
            attention (CSPS); the same results, up to rounding.
        wire: the format in which the decoder layers exchange activations, of 8 bits a number (`seqpar.comm.wire`): sums
            and gathers over `tp`, both all-to-alls over `sp`. Results then differ from the model's own. The sum of the
            embedding, the gather of the last rows and that of the logits stay exact, and so do gradients on their way.
        experts: where a mixture keeps its experts: a slice of each on every rank of `tp`, or whole ones on each rank of
            the mesh ("ep"), to which tokens travel (`seqpar.layers.moe`).
        shift: run each step under the layout that suits its number of tokens (Shift Parallelism), over one cache and
            one copy of the weights; the same results, up to rounding. A number: up to so many tokens pure tensor
            parallelism over all ranks, above it the layout of `mesh`. A `Shift`: its layouts. "auto" measures all that
            the mesh reaches at the first step (`AutoShift`); `explain_shift` says what it chose and why. Steps with
            gradients run under the layout of `mesh`.
        prefill: what computes prompts: "ulysses", or "ring" (`seqpar.layers.RingAttention`, with gradients too), under
            which tokens stay on their ranks, or a `CSA`, whose policy sends a part of the keys. Steps of both run under
            the layout of `mesh` and compute all rows of the last layer.
        decode: where decodes are computed: "local", each rank with its own heads, or "qship", by shipping queries to a
            cache that is dealt out by tokens (`seqpar.layers.QShipDecodeAttention`); "auto" or an `AutoDecode` ships
            where that is faster by times measured at the first decode, and `explain_decode` says why. Any pair goes
            together, with the same results up to rounding and what a policy leaves out. A cache is moved from where the
            prefill left it to where decodes read it before a decode, once; prompts that follow are computed where it
            lies then.

    Comm:  agreement on the model and on samples of its weights.

    Raises:
        TypeError, ValueError: a model that cannot be parallelized on this mesh, or that differs between ranks; the same
            on every rank, and nothing has changed.
    """
    groups = comm.groups(mesh)
    content, modules = b"", None
    with agreed(groups.flat):
        check_model(model)
        options = f"{sequence_sharded} {overlap} {pipeline} {wire} {experts} {shift} {prefill} {decode}"
        content = _sample(model) + options.encode()
        modules = build(
            model,
            groups,
            sequence_sharded=sequence_sharded,
            overlap=overlap,
            pipeline=pipeline,
            wire=wire,
            experts=experts,
            shift=shift,
            prefill=prefill,
            decode=decode,
        )
    check_same("config and weights of `model`", content, group=groups.flat, device=model.device)
    assert modules is not None
    parallel = Parallelized(model, groups, *modules)
    parallel.add_layouts()
    return parallel


def build(
    model: PreTrainedModel,
    groups: Groups,
    *,
    sequence_sharded: bool = False,
    overlap: Interleave | AutoOverlap | Literal["auto", "off"] = "off",
    pipeline: ThreePhase | None = None,
    wire: Wire | None = None,
    experts: ExpertPlacement = "tp",
    shift: int | Shift | AutoShift | Literal["auto", "off"] = "off",
    prefill: Prefill = "ulysses",
    decode: Decode = "local",
) -> tuple[ParallelBackbone, ParallelLMHead]:
    """The parallel modules for a model; meta weights give meta slices.

    Raises:
        ValueError: its heads cannot be split over the mesh, or shifting would need weights that it does not store.
        TypeError: an overlap, a pipeline or a shift that is none.
    """
    if overlap not in ("auto", "off") and not isinstance(overlap, (Interleave, AutoOverlap)):
        raise TypeError(f'`overlap` must be an Interleave, an AutoOverlap, "auto" or "off", got {overlap!r}')
    if pipeline is not None and not isinstance(pipeline, ThreePhase):
        raise TypeError(f"`pipeline` must be a ThreePhase or None, got {pipeline!r}")
    if experts not in ("tp", "ep"):
        raise ValueError(f'`experts` must be "tp" or "ep", got {experts!r}')
    check_methods(prefill, decode, pipeline=pipeline, wire=wire, overlap=overlap)
    rule = shift_rule(shift, groups.layout)
    chosen = AutoOverlap() if overlap == "auto" else None if overlap == "off" else overlap
    config, stack = model.config, model.model
    heads = HeadMap(config.num_attention_heads, config.num_key_value_heads, *groups.layout)
    layers = decoder_layers(
        model,
        groups,
        Range(0, len(stack.layers)),
        sequence_sharded=sequence_sharded,
        pipeline=pipeline,
        wire=wire,
        experts=experts,
    )
    head_dim = stack.layers[0].self_attn.head_dim
    attend = Attend(prefill, decode, heads=heads, head_dim=head_dim)
    add_cores(layers, attend, groups=groups, rope=rope_of(config, head_dim))
    embedding = VocabParallelEmbedding.from_module(stack.embed_tokens, group=groups.tp, sp=groups.layout.sp)
    backbone = ParallelBackbone(
        config,
        embedding,
        layers,
        RMSNorm.from_module(stack.norm, over_tp=sequence_sharded),
        stack.rotary_emb,
        groups=groups,
        heads=heads,
        head_dim=head_dim,
        vocab_size=embedding.num_embeddings,
        windows=sliding_windows(config),
        sequence_sharded=sequence_sharded,
        overlap=chosen,
        shift=rule,
        attend=attend,
    )
    if model.lm_head.weight is stack.embed_tokens.weight:
        return backbone, LMHead.tied(embedding, groups=groups)
    return backbone, LMHead.from_linear(model.lm_head, groups=groups)


def decoder_layers(
    model: PreTrainedModel,
    groups: Groups,
    which: Range,
    *,
    sequence_sharded: bool = False,
    pipeline: ThreePhase | None = None,
    wire: Wire | None = None,
    experts: ExpertPlacement = "tp",
) -> list[ParallelDecoderLayer]:
    """Some consecutive decoder layers of a model, sliced; in a cache of theirs they count from 0.

    Raises:
        ValueError: heads that cannot be split over the mesh.
    """
    config, stack = model.config, model.model
    heads = HeadMap(config.num_attention_heads, config.num_key_value_heads, *groups.layout)
    windows = sliding_windows(config)
    return [
        ParallelDecoderLayer.from_module(
            layer,
            groups=groups,
            heads=heads,
            layer_index=index,
            window=windows[which.start + index],
            softmax_scale=layer.self_attn.scaling,
            sequence_sharded=sequence_sharded,
            pipeline=pipeline,
            wire=wire,
            experts=experts,
        )
        for index, layer in enumerate(stack.layers[which.start : which.stop])
    ]


def shift_rule(shift: Any, stored: Layout) -> Shift | AutoShift | None:
    """What decides the layout of a step; None where all run under the stored one."""
    if isinstance(shift, str) and shift in ("auto", "off"):
        return AutoShift() if shift == "auto" else None
    if isinstance(shift, int) and not isinstance(shift, bool):
        return Shift.threshold(shift, stored)
    if not isinstance(shift, (Shift, AutoShift)):
        raise TypeError(f'`shift` must be a number of tokens, a Shift, an AutoShift, "auto" or "off", got {shift!r}')
    for layout in shift.layouts if isinstance(shift, Shift) else ():
        if not stored.reaches(layout):
            raise ValueError(
                f"`shift` must have layouts that are reachable from the stored {tuple(stored)}, got {tuple(layout)}; "
                f"reachable are {layout_names(stored.reachable)}"
            )
    return shift


def _weights(module: nn.Module, layout: Layout) -> list[Tensor]:
    """The parameters of one module as a step under `layout` uses them."""
    if isinstance(module, ShardedModule):
        return module.weights(layout)
    return list(module.parameters(recurse=False))


def _sample(model: PreTrainedModel) -> bytes:
    """The config and the first numbers of every weight: enough to notice another seed."""
    content = [model.config.to_json_string().encode()]
    for name, param in model.named_parameters():
        first = param.detach().reshape(-1)[:16].to("cpu", torch.float64)
        content += [f"{name} {param.dtype} {tuple(param.shape)}".encode(), first.numpy().tobytes()]
    return b"".join(content)


def _hand_down(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the causal LM's forward: let the stack return only the rows that the head is asked for."""
    _check_labels(kwargs)
    keep = kwargs.get("logits_to_keep", 0)
    by_row = isinstance(keep, Tensor) and keep.dim() == 2
    if by_row and not hasattr(modeling_utils, "slice_logits_to_keep"):
        raise ValueError(
            f"`logits_to_keep` must have one dim in Transformers {transformers_version}, got shape {list(keep.shape)}; "
            "newer ones take indices or a mask for each row"
        )
    flattens = by_row and keep.dtype == torch.bool
    if flattens or kwargs.get("output_hidden_states", model.config.output_hidden_states):
        return None  # all rows are wanted, or Transformers will drop the batch dim
    return args, {**kwargs, "logits_to_keep": 0, KEEP: keep} if "logits_to_keep" in kwargs else kwargs


def _check_labels(kwargs: dict[str, Any]) -> None:
    """Refuse a loss over padding: logits there depend on the attention implementation, and ours are zeros."""
    mask = kwargs.get("attention_mask")
    for name, ahead in (("labels", 1), ("shift_labels", 0)):
        labels = kwargs.get(name)
        if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.dim() != 2 or labels.dim() != 2:
            continue
        columns = labels.shape[1] - ahead
        used = labels[:, ahead:] != -100
        kept = mask[:, -labels.shape[1] :][:, :columns] != 0
        if used.shape == kept.shape and (used & ~kept).any():
            raise ValueError(f"`{name}` must be -100 where the token that predicts them is padding, got others there")


def _parallel_save(parallel: Parallelized) -> Callable[..., None]:
    """`model.save_pretrained` that gathers the weights and lets rank 0 write; call it on every rank."""
    plain = type(parallel.model).save_pretrained

    @functools.wraps(plain)
    def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if args or {"state_dict", "is_main_process", "distributed_checkpoint"} & kwargs.keys():
            raise TypeError("`save_pretrained` must get no state dict and no main process of the caller's, got some")
        state = parallel.gather_state_dict()
        with agreed(parallel.groups.flat):
            if parallel.groups.flat.rank() == 0:
                plain(model, save_directory, state_dict=state, **kwargs)

    return method_of(parallel.model, save_pretrained)
