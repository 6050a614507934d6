"""Triton kernels compiled for GPUs that are not here, and what they use.

A process either interprets Triton or compiles it, and the tests interpret: `compile_for` is called in a new one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Resources(NamedTuple):
    """What a kernel needs of a multiprocessor; bytes on the `stack` are spilled registers."""

    registers: int
    stack: int
    shared: int


class _Device:
    """What Triton asks of a driver before it compiles; a device for each target, or the cache would mix them."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_for(arch: int, kernel: Any, *args: Any, **options: Any) -> Resources:
    """Compile a `triton.jit` function as the launch `kernel[grid](*args, **options)` would on sm_`arch`."""
    import triton

    triton.runtime.driver.set_active(_Device(arch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton's own options
        compiled = kernel.warmup(*args, grid=(1,), **options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listed)
    assert found, listed
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared)


def compiled_apart(code: str) -> Any:
    """What `code`, which prints JSON, prints in a process that compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
