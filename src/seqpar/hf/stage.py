"""One stage of a checkpoint: its layers alone are read, onto the ranks of the stage, with a cache of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar import comm
from seqpar.comm import DeviceMesh, Handle, Stages, Steps, Wire
from seqpar.hf.agreed import agreed, check_same
from seqpar.hf.auto import AutoOverlap
from seqpar.hf.cache import CacheSpec
from seqpar.hf.loading import (
    EMBEDDING,
    HEAD,
    build_on_meta,
    check_tensors,
    check_tied,
    describe,
    place_of,
    read_tensors,
    shows,
)
from seqpar.hf.shift import AutoShift
from seqpar.hf.stepper import check_rotations
from seqpar.hf.swap import LoadReport, decoder_layers, shift_rule
from seqpar.kv import PagedKV
from seqpar.layers import (
    ExpertPlacement,
    ParallelLMHead,
    PipelineStage,
    RMSNorm,
    VocabParallelEmbedding,
    name_modules,
)
from seqpar.partition import HeadMap, Interleave, Range, Shift, stage_layers
from seqpar.ragged import RaggedBatch

__all__ = ["Stage", "load_stage"]


class Stage:
    """One stage of a model over a cache of its own: what `seqpar.batching.PipelineFusion` runs. See `load_stage`.

    Called, it runs a step through all stages and gives its logits on every rank, which `TemporalFusion` takes: one step
    in flight, with all but one stage idle.

    Attributes:
        module: the layers, whose weights want no gradients.
        stages: the ranks.
        kv: the cache of this stage's layers and this rank's heads.
        vocab_size: ids that the model knows.
        calls: steps begun so far.
        report: what loading cost this rank.
    """

    def __init__(
        self, module: PipelineStage, rotary_emb: nn.Module, kv: PagedKV, *, vocab_size: int, report: LoadReport
    ) -> None:
        self.module, self.stages, self.kv = module, module.stages, kv
        self.vocab_size, self.report, self.calls = vocab_size, report, 0
        self._rotary_emb = rotary_emb

    def steps(self, batch: RaggedBatch, tokens: Int64[Tensor, " t"], rows: Sequence[int]) -> Steps[Tensor | Handle]:
        """See `PipelineStage.steps`; every rank of every stage runs the same batches in the same order.

        Args:
            batch: the step, `kv`'s.
            tokens: ids of all its T tokens, the same on every rank.
            rows: whose logits are wanted, increasing.
        """
        self.calls += 1
        tables = self._rotary_emb(next(self.module.parameters()), position_ids=batch.positions[None])
        cos, sin = (table[0] for table in tables)
        return (yield from self.module.steps(tokens, batch, cos, sin, self.kv, rows=rows))

    def __call__(self, batch: RaggedBatch, tokens: Int64[Tensor, " t"], rows: Sequence[int]) -> Float[Tensor, "rows v"]:
        """Append the batch's tokens to the caches, and give the logits of some rows, on every rank.

        Comm:  a message between neighbouring stages, the layers' collectives, a broadcast of the logits.
        """
        out = comm.run(self.steps(batch, tokens, rows))
        like, pp = next(self.module.parameters()), self.stages.pp
        if isinstance(out, Handle):
            out.wait()
        if not rows or isinstance(out, Handle):
            out = like.new_zeros(len(rows), self.vocab_size)
        return comm.broadcast(out, src=pp.size() - 1, group=pp, label="logits") if rows else out


def load_stage(
    path: str | Path,
    mesh: DeviceMesh,
    *,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    wire: Wire | None = None,
    experts: ExpertPlacement = "tp",
    shift: int | Shift | Literal["off"] = "off",
    overlap: Interleave | Literal["off"] = "off",
) -> Stage:
    """Load this rank's slices of this rank's stage of a causal LM from safetensors; every rank of the mesh calls it.

    Layers are split evenly, earlier stages taking what is left over (`partition.stage_layers`). The first stage reads
    the embedding, the last one the head; where they are tied and not on one stage, both read their rows.

    Args:
        path: directory in Hugging Face's format; see `load`.
        mesh: with the axis "pp"; see `seqpar.init_mesh`.
        num_pages: of the cache of each stage, for all requests.
        page_size: tokens in a page.
        dtype: of the weights; see `load`.
        device: where they go; by default the mesh's device.
        progress: show a bar on rank 0; by default where stderr is a terminal.
        wire: the format in which the layers exchange activations; see `parallelize`. Stages hand over unencoded ones.
        experts: see `parallelize`.
        shift: layouts of the ranks of a stage, by the number of tokens of a micro-batch; see `parallelize`. Nothing is
            measured here, so there is no "auto".
        overlap: how the stages cut large micro-batches; likewise.

    Comm:  agreement before and after reading; the groups of the layouts, when they are made.

    Raises:
        TypeError, ValueError: a checkpoint that `load` would refuse, a mesh without the axis "pp", more stages than
            layers, a shift or an overlap that is none, rotary positions that depend on the longest request; the same on
            every rank.
    """
    stages = comm.stages(mesh)
    place = place_of(mesh) if device is None else torch.device(device)
    stage: Stage | None = None
    module: PipelineStage | None = None
    content = b""
    with agreed(stages.whole):
        checkpoint, model = build_on_meta(Path(path), dtype)
        check_tensors(checkpoint, model)
        check_rotations(model.model.rotary_emb)
        module = _build(model, stages, wire, experts, *_methods(shift, overlap, stages))
        options = f"{num_pages} {page_size} {wire} {experts} {shift} {overlap}"
        content = describe(checkpoint, model) + options.encode()
    check_same("checkpoint, `dtype` and options", content, group=stages.whole, device=place)
    assert module is not None
    if module.shift is not None:
        module.add_layouts(comm.layout_groups(stages.groups, module.shift.layouts))
    with agreed(stages.whole):
        begin = time.perf_counter()
        tied = bool(model.config.tie_word_embeddings)
        read_tensors(
            module, model, checkpoint, place, shows(progress, stages.whole), named=lambda name: _named(name, tied)
        )
        if tied and isinstance(module.lm_head, ParallelLMHead):
            check_tied(module.lm_head, checkpoint)
        rotary = type(model.model.rotary_emb)(model.config).to(place)
        weight_bytes = sum(param.nbytes for param in module.parameters())
        seconds = time.perf_counter() - begin
        report = LoadReport(checkpoint.bytes_read, weight_bytes, len(checkpoint.names_read), seconds)
        kv = _spec(model, stages, len(module.layers), place).make(num_pages, page_size, None)
        stage = Stage(
            module.eval().requires_grad_(False), rotary, kv, vocab_size=model.config.vocab_size, report=report
        )
    assert stage is not None
    return stage


def _methods(shift: Any, overlap: Any, stages: Stages) -> tuple[Shift | None, Interleave | None]:
    """What `shift=` and `overlap=` say, for a stage, which measures nothing."""
    for name, given in (("shift", shift), ("overlap", overlap)):
        if given == "auto" or isinstance(given, (AutoShift, AutoOverlap)):
            raise TypeError(f'`{name}` must be given or "off" for stages, which do not measure, got {given!r}')
    if overlap != "off" and not isinstance(overlap, Interleave):
        raise TypeError(f'`overlap` must be an Interleave or "off" for stages, got {overlap!r}')
    rule = shift_rule(shift, stages.groups.layout)
    assert not isinstance(rule, AutoShift), "refused"
    return rule, None if overlap == "off" else overlap


def _build(
    model: PreTrainedModel,
    stages: Stages,
    wire: Wire | None,
    experts: ExpertPlacement,
    shift: Shift | None,
    overlap: Interleave | None,
) -> PipelineStage:
    """This rank's slices of its stage, on the meta device as the model is."""
    groups, pp, stack = stages.groups, stages.pp, model.model
    which = stage_layers(len(stack.layers), pp.size())[pp.rank()]
    parts: dict[str, Any] = {}
    if pp.rank() == 0:
        parts["embed_tokens"] = VocabParallelEmbedding.from_module(
            stack.embed_tokens, group=groups.tp, sp=groups.layout.sp
        )
    if pp.rank() == pp.size() - 1:
        tied = model.lm_head.weight is stack.embed_tokens.weight and "embed_tokens" in parts
        parts["norm"] = RMSNorm.from_module(stack.norm)
        parts["lm_head"] = (
            ParallelLMHead.tied(parts["embed_tokens"], groups=groups)
            if tied
            else ParallelLMHead.from_linear(model.lm_head, groups=groups)
        )
    layers = decoder_layers(model, groups, which, wire=wire, experts=experts)
    parts |= {"hidden_size": model.config.hidden_size, "shift": shift, "overlap": overlap}
    module = PipelineStage(layers, stages=stages, first_layer=which.start, **parts)
    name_modules(module)
    return module


def _named(name: str, tied: bool) -> str:
    """What a tensor of a stage is called in the model."""
    if name == HEAD and tied:
        return EMBEDDING
    return name if name == HEAD else f"model.{name}"


def _spec(model: PreTrainedModel, stages: Stages, num_layers: int, device: torch.device) -> CacheSpec:
    """What this rank caches."""
    config, groups = model.config, stages.groups
    heads = HeadMap(config.num_attention_heads, config.num_key_value_heads, *groups.layout)
    mine: Range = heads.kv_ranges[groups.flat.rank()]
    return CacheSpec(num_layers, mine.size, model.model.layers[0].self_attn.head_dim, model.dtype, device)
