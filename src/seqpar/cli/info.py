"""`python -m seqpar info`: versions, devices, and which kernels would run here."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from seqpar import comm, kernels

__all__ = ["run"]

_PACKAGES = ("seqpar", "torch", "triton", "transformers", "safetensors", "einops", "jaxtyping", "matplotlib")
_OPERATORS = ("attention", "merge", "rms_norm", "rotary", "swiglu", "experts", "quantize")
_DTYPES = ("float32", "bfloat16", "float64")


def run(options: argparse.Namespace) -> int:
    """Print it."""
    found = collect()
    print(json.dumps(found, indent=1) if options.json else _table(found))
    return 0


def collect() -> dict[str, Any]:
    """What there is on this machine."""
    devices = [{"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append({"type": "cuda", "name": about.name, "memory_gib": round(about.total_memory / 2**30, 1)})
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chosen = {
        op: {
            f"{kind} {dtype}": kernels.choose_backend(op, torch.device(kind), getattr(torch, dtype))
            for kind in types
            for dtype in _DTYPES
        }
        for op in _OPERATORS
    }
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": devices,
        "collectives": comm.backends(),
        "kernels": chosen,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _table(found: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:14}{number or 'not installed'}" for name, number in found["versions"].items()]
    lines.append("devices")
    for each in found["devices"]:
        more = ", ".join(f"{key} {value}" for key, value in each.items() if key not in ("type", "name"))
        lines.append(f"  {each['type']:14}{each['name']}, {more}")
    lines.append(f"collectives\n  {', '.join(found['collectives']) or 'none'}")
    lines.append('kernels: the backend that "auto" stands for')
    for op, chosen in found["kernels"].items():
        lines.append(f"  {op:14}" + ", ".join(f"{where}: {backend}" for where, backend in chosen.items()))
    return "\n".join(lines)
