"""Triton kernels that move or prepare numbers, on one GPU: checked, then timed against a copy of as many bytes.

Each kernel reads and writes every byte once, so what bounds it is memory: the number of a case is the time of PyTorch's
copy of as many bytes, divided by the kernel's (1 is the ceiling as measured; the target is 0.85). Beside it stands how
much faster it is than the same in PyTorch's own operators. Caches are flushed before every launch.

Shapes are those of Llama 3 8B (model dim 4096, 32 query and 8 KV heads of 128, MLP dim 14336) and of one rank of eight
of its 70B (8192; 8 and 1; 3584), in bfloat16. Results are compared with the definitions before anything is timed; a
wrong one ends the run with exit status 1 and no numbers.

On a CPU (`TRITON_INTERPRET=1`, `--device cpu`) a tiny size is checked in Triton's interpreter, and nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import Row, meta, parser, progress, report
from torch import Tensor

from seqpar.kernels import add_rms_norm, norm_rotary, rms_norm, rotary, swiglu
from seqpar.kernels.columns import KEY, OTHER, QUERY, ColumnPlan, pack_columns, pack_heads, unpack_columns
from seqpar.kernels.dispatch import Backend
from seqpar.kernels.quantize import Wire, decode, decode_sum, encode, recode_sum
from seqpar.kernels.rows import append_rows, copy_spans

EPS, TARGET = 1e-5, 0.85


class Shape(NamedTuple):
    """One model on one rank."""

    name: str
    width: int
    heads: int
    kv_heads: int
    dim: int
    mlp: int


SHAPES = (Shape("8B", 4096, 32, 8, 128, 14336), Shape("70B/tp8", 8192, 8, 1, 128, 3584))
TINY = Shape("tiny", 64, 4, 2, 16, 40)


class Case(NamedTuple):
    """A kernel on some input: `run(backend)` gives the tensors that it makes; `moved` bytes are read or written.

    What is `exact` is to be equal to the definition; else the error may be twice that of the definition in the same
    dtype, against the definition in float64.
    """

    name: str
    run: Callable[[Backend], tuple[Tensor, ...]]
    moved: int
    exact: bool = False
    wide: Callable[[], tuple[Tensor, ...]] | None = None


def cases(shape: Shape, tokens: int, device: torch.device) -> Iterator[Case]:
    """Every kernel on the activations of a prompt."""

    def random(*size: int) -> Tensor:
        x = torch.randn(size, device=device)
        return x if x.is_cpu else x.bfloat16()  # which Triton's interpreter gets wrong

    def bytes_of(*tensors: Tensor) -> int:
        return sum(t.numel() * t.itemsize for t in tensors)

    t, m, h, g, d, f = tokens, shape.width, shape.heads, shape.kv_heads, shape.dim, shape.mlp
    x, more, weight = random(t, m), random(t, m), random(m)
    wide = [tensor.double() for tensor in (x, more, weight)]
    yield Case(
        "rms_norm",
        lambda b: (rms_norm(x, weight, EPS, backend=b),),
        2 * bytes_of(x),
        wide=lambda: (rms_norm(wide[0], wide[2], EPS, backend="reference"),),
    )
    yield Case(
        "add + rms_norm",
        lambda b: add_rms_norm(x, more, weight, EPS, backend=b),
        4 * bytes_of(x),
        wide=lambda: add_rms_norm(*wide, EPS, backend="reference"),
    )
    qkv, (cos, sin), norm = random(t, (h + 2 * g) * d), random(2, t, d).clamp(-1, 1), random(d)
    q = qkv[:, : h * d].view(t, h, d)
    tables = [table.double() for table in (cos, sin)]
    yield Case(
        "rotary",
        lambda b: (rotary(q, cos, sin, backend=b),),
        2 * bytes_of(q) + bytes_of(cos, sin),
        wide=lambda: (rotary(q.double(), *tables, backend="reference"),),
    )
    yield Case(
        "norm + rotary",
        lambda b: (norm_rotary(q, norm, EPS, cos, sin, backend=b),),
        2 * bytes_of(q) + bytes_of(cos, sin),
        wide=lambda: (norm_rotary(q.double(), norm.double(), EPS, *tables, backend="reference"),),
    )
    gate_up = random(t, 2 * f)
    yield Case(
        "swiglu",
        lambda b: (swiglu(gate_up, (f,), backend=b),),
        bytes_of(gate_up) * 3 // 2,
        wide=lambda: (swiglu(gate_up.double(), (f,), backend="reference"),),
    )
    yield from _moves(t, h, g, d, qkv, (cos, sin), norm)
    for wire in ("int8", "fp8"):
        yield from _wire(wire, x, more)


def _moves(t: int, h: int, g: int, d: int, qkv: Tensor, tables: tuple[Tensor, Tensor], norm: Tensor) -> Iterator[Case]:
    """Packing for four sequence ranks, and rows of a cache."""
    share, kinds = -(-h // 4), (QUERY,) * h + (KEY, OTHER) * g
    pairs = [h + 2 * (r * g // 4) for r in range(4)]
    blocks = tuple((*range(r * share, min(h, (r + 1) * share)), pairs[r], pairs[r] + 1) for r in range(4))
    plan, size, item = ColumnPlan(blocks, d, kinds), t * d, qkv.itemsize
    cos, sin = tables
    options: dict[str, Any] = {"cos": cos, "sin": sin, "q_norm": (norm, EPS), "k_norm": (norm, EPS)}
    exact: dict[str, Any] = {
        "cos": cos.double(),
        "sin": sin.double(),
        "q_norm": (norm.double(), EPS),
        "k_norm": (norm.double(), EPS),
    }
    packed = 2 * plan.total * size * item
    yield Case("pack", lambda b: (pack_columns(qkv, plan, backend=b),), packed, exact=True)
    yield Case(
        "pack + norms + rotary",
        lambda b: (pack_heads(qkv, plan, **options, backend=b),),
        packed + 2 * size * item,
        wide=lambda: (pack_heads(qkv.double(), plan, **exact, backend="reference"),),
    )
    back = ColumnPlan(tuple(tuple(range(r * share, min(h, (r + 1) * share))) for r in range(4)), d)
    flat = qkv.flatten()[: t * h * d].contiguous()
    yield Case("unpack", lambda b: (unpack_columns(flat, back, t, backend=b),), 2 * t * h * d * item, exact=True)
    cache = torch.zeros(2, 2 * t, g, d, device=qkv.device, dtype=qkv.dtype)
    slots = torch.randperm(2 * t)[:t].to(qkv.device)
    k, v = qkv[:, h * d :].view(t, g, 2, d).unbind(2)

    def append(backend: Backend) -> tuple[Tensor, ...]:
        append_rows(cache[0], cache[1], k, v, slots, backend=backend)
        return (cache,)

    yield Case("append", append, 4 * t * g * d * item, exact=True)
    page = min(64, t // 4)
    spans = [(2 * i * page, i * page, page) for i in torch.randperm(t // page).tolist()]
    target = torch.zeros_like(cache[0])

    def gather(backend: Backend) -> tuple[Tensor, ...]:
        copy_spans(target, cache[0], spans, backend=backend)
        return (target,)

    yield Case("gather pages", gather, 2 * t * g * d * item, exact=True)


def _wire(wire: Wire, x: Tensor, more: Tensor) -> Iterator[Case]:
    """A wire format, and the sum of four parts in it."""
    n = x.shape[1]
    parts = encode(torch.cat([x, more, x - more, more - x]), wire, backend="reference").view(4, len(x), -1)
    wide, narrow = x.numel() * x.itemsize, parts[0].numel()
    yield Case(f"{wire} encode", lambda b: (encode(x, wire, backend=b),), wide + narrow, exact=True)
    yield Case(f"{wire} decode", lambda b: (decode(parts[0], n, x.dtype, wire, backend=b),), wide + narrow, exact=True)
    yield Case(
        f"{wire} sum of 4",
        lambda b: (decode_sum(list(parts), n, x.dtype, wire, backend=b),),
        wide + 4 * narrow,
        exact=True,
    )
    yield Case(
        f"{wire} sum of 4, encoded",
        lambda b: (recode_sum(list(parts), n, x.dtype, wire, backend=b),),
        5 * narrow,
        exact=True,
    )


def check(case: Case) -> None:
    """Raise AssertionError unless the kernel gives what the definition gives."""
    got, want = (tuple(t.clone() for t in case.run(backend)) for backend in ("triton", "reference"))
    if case.exact:
        assert all(map(torch.equal, got, want)), case.name
        return
    assert case.wide is not None
    for ours, plain, exact in zip(got, want, case.wide(), strict=True):
        bound = 2 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"{case.name}: error {error:.3g} above {bound:.3g}"


def timed(case: Case, device: torch.device) -> tuple[float, float]:
    """(copy's time over the kernel's, PyTorch's over the kernel's)."""
    from triton.testing import do_bench

    source = torch.empty(case.moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ours, plain, copy = (
        do_bench(fn, return_mode="median")
        for fn in (lambda: case.run("triton"), lambda: case.run("torch"), lambda: target.copy_(source))
    )
    return copy / ours, plain / ours


def main() -> int:
    """Check everything, then time everything."""
    args = parser(__doc__ or "")
    args.add_argument("--device", default="cuda")
    args.add_argument("--tokens", type=int, default=16384)
    given = args.parse_args()
    device, rows = torch.device(given.device), []
    torch.manual_seed(0)
    tokens = 8 if device.type == "cpu" else 2048 if given.quick else given.tokens
    for shape in (TINY,) if device.type == "cpu" else SHAPES:
        for case in cases(shape, tokens, device):
            try:
                check(case)
            except AssertionError as error:
                print(f"WRONG RESULT: {shape.name} {error}", file=sys.stderr)
                return 1
            progress(0, 1, f"{shape.name} {case.name}: right")
    if device.type == "cpu":
        print("every kernel gives what its definition gives; nothing is timed on a CPU")
        return 0
    for shape in SHAPES:
        for case in cases(shape, tokens, device):
            copy, plain = timed(case, device)
            rows.append(Row(f"{shape.name} {case.name}", copy, "copy", TARGET, copy >= TARGET))
            rows.append(Row(f"{shape.name} {case.name}, PyTorch's time", plain, "x"))
    name = torch.cuda.get_device_name(device)
    report(given, meta(name, ["torch", "triton"], tokens=tokens), rows, "Kernels against a copy of as many bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
