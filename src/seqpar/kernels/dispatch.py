"""Which implementation an entry runs: chosen by name, or by device and dtype in a way that can be asked.

A Triton kernel reaches PyTorch by `kernel_op`: eager calls launch it as it is, and what traces, compiles, exports or
differentiates sees one operator of the library `seqpar`, with its shapes and its gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "Backend",
    "NamedBackend",
    "auto_backend",
    "choose_backend",
    "kernel_op",
    "refuse_dtype",
    "unknown_backend",
    "wants_grad",
    "warn_of_reference",
]

Backend = Literal["auto", "torch", "reference", "triton"]
NamedBackend = Literal["flashinfer", "flash_attn"]
"""Packages that `"auto"` never stands for, and nothing requires."""

TRITON_OPS = frozenset(
    {"attention", "blocks", "merge", "placed", "sparse"}
    | {"columns", "norm_rotary", "quantize", "rms_norm", "rotary", "rows", "swiglu"}
)
"""Operations for which Triton is what `"auto"` means on a GPU."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DEVICES = frozenset({"cuda"})


def choose_backend(op: str, device: torch.device, dtype: torch.dtype) -> Literal["torch", "reference", "triton"]:
    """The backend that `backend="auto"` stands for.

    On a GPU the Triton kernels where there are some and Triton is installed; PyTorch's fused operators serve all else
    but float64 attention on a GPU, for which there are none.
    """
    if op in TRITON_OPS and device.type in TRITON_DEVICES and dtype in TRITON_DTYPES and _has_triton():
        return "triton"
    if op in ("attention", "placed", "sparse", "tile") and device.type == "cuda" and dtype == torch.float64:
        return "reference"
    return "torch"


def auto_backend(op: str, device: torch.device, dtype: torch.dtype) -> Literal["torch", "reference", "triton"]:
    """`choose_backend` for a call: on a GPU the definition, which holds all scores, never runs without a word."""
    chosen = choose_backend(op, device, dtype)
    if chosen == "reference":
        warn_of_reference(op, device, dtype)
    return chosen


def warn_of_reference(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say that `backend="auto"` is the definition, once for a place in the program, as warnings are."""
    warnings.warn(
        f'`backend="auto"` of `{op}` is "reference" for {dtype} on {device.type}, which is slow and holds all scores; '
        'name "reference" if that is meant, or use another dtype',
        stacklevel=4,
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def unknown_backend(backend: str, *more: str) -> ValueError:
    known = ", ".join(f'"{name}"' for name in ("auto", "torch", "reference", *more))
    return ValueError(f"`backend` must be one of {known}, got {backend!r}")


def refuse_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that no Triton kernel takes."""
    if dtype not in TRITON_DTYPES:
        raise ValueError(
            f'`{name}` must be float32, bfloat16 or float16 for backend="triton", got {dtype}; backend="torch" takes it'
        )


def kernel_op(
    schema: str,
    launch: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make the function that launches a kernel one that `torch.compile`, `torch.export` and autograd take whole.

    An eager call without gradients goes straight to `launch`: the dispatcher would add several microseconds of host
    time to each. Any other goes through the operator `torch.ops.seqpar.<name>`, which runs `launch` on real tensors.

    Call it at the end of a `triton.py`, which entries import when they first need it.

    Args:
        schema: as PyTorch writes it, with the name: `"scale(Tensor x, float factor) -> Tensor"`; `Tensor(a!) x` for
            what is written to.
        launch: takes the schema's arguments by position, allocates what it returns, and launches. What it returns is
            new memory, never an argument.
        fake: likewise, but only allocates: strides and dtypes are to be those of `launch`.
        mutates: names of the arguments that are written to.
        setup: `setup_context(ctx, inputs, output)` of `torch.library.register_autograd`.
        backward: `backward(ctx, *grads)` of the same. Without it a gradient that is wanted is an error in backward.

    Returns:
        A function of the schema's arguments by position.
    """
    name, arguments = schema.split("(", 1)
    run = _on_their_device(launch)
    op = torch.library.custom_op(f"seqpar::{name}", run, mutates_args=mutates, schema=f"({arguments}")
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup)
    registered = getattr(torch.ops.seqpar, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _observed(args):
            return registered(*args)
        return run(*args)

    return call


def _on_their_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The same on the device of its first tensor, since Triton launches on the current one."""

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(*args)
        return launch(*args)

    return run


def _observed(args: Sequence[Any]) -> bool:
    """Whether a mode, a tensor subclass or autograd looks on."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return is_in_torch_dispatch_mode() or not plain or wants_grad(*tensors)
