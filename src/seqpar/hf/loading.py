"""Load a checkpoint by slices: build on the meta device, swap, then read what this rank owns and nothing else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from seqpar import comm
from seqpar.comm import DeviceMesh, ProcessGroup, Wire
from seqpar.hf.agreed import agreed, check_same
from seqpar.hf.attend import Decode, Prefill
from seqpar.hf.auto import AutoOverlap
from seqpar.hf.checkpoint import DTYPES, Checkpoint, Names, parse_object
from seqpar.hf.models import ARCHITECTURES, check_config, stored_names
from seqpar.hf.shift import AutoShift
from seqpar.hf.swap import LoadReport, Parallelized, build
from seqpar.layers import ExpertPlacement, ParallelLMHead, iter_sources
from seqpar.partition import Interleave, Shift, ThreePhase

__all__ = [
    "EMBEDDING",
    "HEAD",
    "build_on_meta",
    "check_tensors",
    "check_tied",
    "describe",
    "load",
    "place_of",
    "read_tensors",
    "shows",
]

CONFIG, GENERATION = "config.json", "generation_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(
    path: str | Path,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    sequence_sharded: bool = False,
    overlap: Interleave | AutoOverlap | Literal["auto", "off"] = "off",
    pipeline: ThreePhase | None = None,
    wire: Wire | None = None,
    experts: ExpertPlacement = "tp",
    shift: int | Shift | AutoShift | Literal["auto", "off"] = "off",
    prefill: Prefill = "ulysses",
    decode: Decode = "local",
    verify: bool = False,
) -> PreTrainedModel:
    """Load a causal LM from safetensors, each rank its own slices.

    Args:
        path: directory in Hugging Face's format, with `model.safetensors` or `model.safetensors.index.json`.
        mesh: see `seqpar.init_mesh`.
        dtype: of the weights; by default the config's, or the file's where that has none.
        device: where they go; by default the mesh's device.
        progress: show a bar on rank 0; by default where stderr is a terminal.
        sequence_sharded: see `parallelize`.
        overlap: see `parallelize`.
        pipeline: see `parallelize`.
        wire: see `parallelize`.
        experts: see `parallelize`.
        shift: see `parallelize`.
        prefill: see `parallelize`.
        decode: see `parallelize`.
        verify: first compare all bytes of the files, on every rank, with `SHA256SUMS` beside them, as `sha256sum`
            writes it.

    Returns:
        The Transformers model in evaluation mode; `model.seqpar` has the `LoadReport`.

    Comm:  agreement before and after reading.

    Raises:
        TypeError, ValueError: a checkpoint that is corrupt, incomplete, not what its config says, changing while it is
            read, or of a model that cannot be parallelized on this mesh; the same on every rank.
    """
    groups = comm.groups(mesh)
    place = place_of(mesh) if device is None else torch.device(device)
    parallel: Parallelized | None = None
    checkpoint: Checkpoint | None = None
    content = b""
    with agreed(groups.flat):
        checkpoint, whole = build_on_meta(Path(path), dtype)
        modules = build(
            whole,
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
        parallel = Parallelized(whole, groups, *modules)
        check_tensors(checkpoint, parallel.model)
        if verify:
            checkpoint.verify()
        options = f"{sequence_sharded} {overlap} {pipeline} {wire} {experts} {shift} {prefill} {decode} {verify}"
        content = describe(checkpoint, whole) + options.encode()
    check_same("checkpoint, `dtype` and options", content, group=groups.flat, device=place)
    assert parallel is not None and checkpoint is not None
    with agreed(groups.flat):
        parallel.report = _fill(parallel, checkpoint, place, shows(progress, groups.flat))
    parallel.add_layouts()
    model: PreTrainedModel = parallel.model.eval()
    return model


def build_on_meta(path: Path, dtype: torch.dtype | None) -> tuple[Checkpoint, PreTrainedModel]:
    """Open the checkpoint and make the model that its config describes, without memory for weights."""
    if not (path / CONFIG).is_file():
        raise ValueError(f"`path` must be a directory with {CONFIG}, got {path}")
    raw = parse_object(path / CONFIG, (path / CONFIG).read_bytes())
    kind, architectures = raw.get("model_type"), raw.get("architectures")
    if kind not in ARCHITECTURES or (architectures and ARCHITECTURES[kind] not in architectures):
        raise ValueError(
            f"`path` must hold a model of {', '.join(ARCHITECTURES.values())}, got model_type {kind!r} "
            f"with architectures {architectures}"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_config(config)
    checkpoint = Checkpoint.open(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=_dtype(dtype, config, checkpoint)
        )
    if (path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return checkpoint, model


def _dtype(dtype: Any, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The caller's, the config's or the file's."""
    if dtype is None:
        stored = next((entry.dtype for entry in checkpoint.entries.values()), "F32")
        dtype = config.dtype or DTYPES.get(stored, torch.float32)
    if dtype not in DTYPES.values():
        raise TypeError(f"`dtype` must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}")
    return dtype  # type: ignore[no-any-return]


def check_tensors(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Compare the checkpoint with all that a model needs, parallel or Transformers' own.

    Raises:
        ValueError: they do not fit.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    made_of: dict[str, list[str]] = {}
    for name, shape in _shapes(model).items():
        names = _names(checkpoint, name, shape, model)
        if isinstance(names, str):
            shapes[names] = shape
            continue
        _, rows, columns = shape
        made_of[name] = [part for beside in names for part in beside]
        shapes |= dict.fromkeys(made_of[name], (rows // len(names[0]), columns))
    rebuilt = [name for name in checkpoint.entries if name.endswith("rotary_emb.inv_freq")]  # in old checkpoints
    tied = {HEAD: shapes[EMBEDDING]} if HEAD not in shapes and HEAD in checkpoint.entries else {}
    checkpoint.check({**shapes, **tied}, optional=rebuilt)
    for name, parts in made_of.items():
        dtypes = sorted({checkpoint.entries[part].dtype for part in parts})
        if len(dtypes) > 1:
            raise ValueError(f"`{name}` must be stored in parts of one dtype, got {', '.join(dtypes)}")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The unsharded tensors of a model."""
    sources = {name: source.shape for name, _, _, source in iter_sources(model)}
    return sources or {name: tuple(param.shape) for name, param in model.named_parameters()}


def _names(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], model: Any) -> Names:
    """What the checkpoint calls a tensor of the model; its own name where it was saved as Transformers holds it."""
    return name if name in checkpoint.entries else stored_names(name, shape, model.config.model_type)


def describe(checkpoint: Checkpoint, model: PreTrainedModel) -> bytes:
    """What ranks must have in common: the config, the dtype and the headers of the files."""
    tensors = sorted((name, entry.dtype, entry.shape) for name, entry in checkpoint.entries.items())
    return f"{model.config.to_json_string()} {model.dtype} {tensors}".encode()


def read_tensors(
    sharded: nn.Module,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    show: bool,
    *,
    named: Callable[[str], str] = str,
) -> None:
    """Read this rank's windows of all tensors of `sharded`; `named` says what one is called in the model."""
    reads = [
        (_names(checkpoint, named(name), source.shape, model), module, own, source.dim, window)
        for name, module, own, source in iter_sources(sharded)
        for window in source.windows
    ]
    total = sum(checkpoint.window_bytes(names, dim, window) for names, _, _, dim, window in reads)
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=not show) as bar:
        for names, module, own, dim, window in reads:
            tensor = checkpoint.read(names, dim, window)
            module.load_source(own, tensor.to(device), window.start)
            bar.update(tensor.nbytes)


def _fill(parallel: Parallelized, checkpoint: Checkpoint, device: torch.device, show: bool) -> LoadReport:
    """Read what this rank stores."""
    begin, model = time.perf_counter(), parallel.model
    read_tensors(model, model, checkpoint, device, show)
    stack = model.model
    stack.rotary_emb = type(stack.rotary_emb)(model.config).to(device)
    if model.lm_head.weight is None:
        check_tied(model.lm_head, checkpoint)
    seconds = time.perf_counter() - begin
    return LoadReport(checkpoint.bytes_read, parallel.weight_bytes, len(checkpoint.names_read), seconds)


def check_tied(head: ParallelLMHead, checkpoint: Checkpoint) -> None:
    """Compare a stored head with the embedding, whose rows `head` has: the config ties them, the files may hold both.

    Raises:
        ValueError: they differ.
    """
    if HEAD in checkpoint.entries:
        rows = head.weight_rows()
        if not torch.equal(checkpoint.read(HEAD, 0, head.rows).to(rows.device, rows.dtype), rows):
            raise ValueError(
                f"`{HEAD}` must equal `{EMBEDDING}`, as config.json ties them, got other numbers; "
                "set tie_word_embeddings to false"
            )


def shows(progress: bool | None, group: ProcessGroup) -> bool:
    """Whether this rank draws a bar."""
    return group.rank() == 0 and (sys.stderr.isatty() if progress is None else progress)


def place_of(mesh: DeviceMesh) -> torch.device:
    """The mesh's device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
