"""Triton kernels compiled for GPUs that are not here, and what they use there.

Every `triton.py` below `seqpar.kernels` has a function `variants()` that yields a `Variant` for each way in which its
kernels are launched: per dtype and configuration one. `compiled` makes code of one for a target, `fingerprint` says
what that code is made from, without compiling. The table of all of them, `docs/results/kernels.md`, is written by
`make kernels`; the suite compares its fingerprints with the sources, and fails where one is stale or a kernel spills.

A process either interprets Triton or compiles it: whoever compiles sets `TRITON_INTERPRET=0` before the first import.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import pkgutil
import re
import subprocess
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["TARGETS", "Resources", "Target", "Variant", "compiled", "every_variant", "fingerprint", "resources"]


class Target(NamedTuple):
    """A GPU that Triton compiles for, and the shared memory that one of its blocks may have (vendors' documents)."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 << 10),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10),
}
"""A100; H100 and H200; B200; MI300."""


class Variant(NamedTuple):
    """One way to launch a kernel.

    Attributes:
        name: of the configuration, once in a module: dtype first, then what tells it from the others.
        kernel: the `triton.jit` function.
        signature: the type of every argument by name, as Triton writes them: "*bf16", "i32", "fp32". A pointer is to
            16 aligned bytes and a number to a multiple of 16 where that is written behind it ("i32:16"); pointers
            without it are too, as all of PyTorch's memory, unless they end in ":1".
        constexprs: the values of the others by name.
        num_warps: of the launch.
        num_stages: of the launch.
        options: of the launch, further ones.
        targets: those that it is launched on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    options: Mapping[str, Any] = {}
    targets: tuple[str, ...] = tuple(TARGETS)


class Resources(NamedTuple):
    """What a kernel needs of a multiprocessor: registers of a thread, bytes of them that are spilled, shared memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def every_variant() -> dict[str, Variant]:
    """All variants of all kernels by `folder/kernel/name`, those of a kernel together."""
    import seqpar.kernels

    found: dict[str, Variant] = {}
    for module in _triton_modules(seqpar.kernels):
        folder = module.__name__.split(".")[-2]
        for each in getattr(module, "variants", lambda: ())():
            variant = Variant(*each)
            name = f"{folder}/{variant.kernel.__name__}/{variant.name}"
            assert name not in found, name
            found[name] = variant
    return dict(sorted(found.items(), key=lambda item: item[0].rsplit("/", 1)[0]))


def fingerprint(variant: Variant) -> str:
    """A hash of all that the code of a variant is made from: its source, that of what it calls, and the launch.

    Comments, docstrings and the layout of the source do not count.
    """
    launch = (
        sorted(variant.signature.items()),
        sorted((name, str(value)) for name, value in variant.constexprs.items()),
        (variant.num_warps, variant.num_stages, sorted(variant.options.items())),
    )
    parts = [repr(launch), *_sources(variant.kernel.fn, {})]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compiled(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel for a target: `asm` has its stages, `metadata.shared` its shared memory.

    Raises:
        ValueError: an unknown target.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if target not in TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(TARGETS)}, got {target!r}")
    to, names = TARGETS[target], variant.kernel.arg_names
    signature = {name: _type_of(variant, name) for name in names}
    attrs = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if _is_aligned(variant, name)}
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton's own options
        return compile(source, target=GPUTarget(to.backend, to.arch, to.warp_size), options=options)


def resources(kernel: Any) -> Resources:
    """What a kernel that `compiled`, or a launch, made needs; read from its code."""
    if "amdgcn" in kernel.asm:
        listed = kernel.asm["amdgcn"]
        vector, vector_spilled, scalar_spilled = (
            int(_found(rf"\.{name}:\s+(\d+)", listed)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        )
        return Resources(vector, 4 * (vector_spilled + scalar_spilled), kernel.metadata.shared)
    listed = _resource_usage(kernel.asm["cubin"])
    registers, stack, local = (int(_found(rf"{name}:(\d+)", listed)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, kernel.metadata.shared)


def _resource_usage(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    assert found, text
    return found


def _type_of(variant: Variant, name: str) -> str:
    return "constexpr" if name in variant.constexprs else variant.signature[name].split(":")[0]


def _is_aligned(variant: Variant, name: str) -> bool:
    if name in variant.constexprs:
        return False
    type_, _, multiple = variant.signature[name].partition(":")
    return multiple == "16" or (type_.startswith("*") and not multiple)


def _triton_modules(package: ModuleType) -> Iterator[ModuleType]:
    """The modules called `triton` of a package's folders, by name."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.") if module.ispkg]
    for name in sorted(names):
        parts = import_module(name).__path__
        if any(module.name == "triton" for module in pkgutil.iter_modules(parts)):
            yield import_module(f"{name}.triton")


def _sources(fn: Any, seen: dict[Any, None]) -> Iterator[str]:
    """The source of a function and of what it calls of ours, then the constants that they read."""
    if fn in seen:
        return
    seen[fn] = None
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        del function.body[0]
    yield ast.unparse(tree)
    for name in fn.__code__.co_names:
        value = fn.__globals__.get(name)
        if hasattr(value, "fn") and inspect.isfunction(value.fn):
            if value.fn.__module__.startswith("seqpar."):
                yield from _sources(value.fn, seen)
        elif isinstance(value, int | float | str) or type(value).__name__ == "constexpr":
            yield f"{name} = {value}"
