"""Composable PyTorch layers for parallel transformer inference.

`import seqpar` loads nothing else: a submodule is imported when it is first used, so `seqpar.partition` costs no
PyTorch and only `seqpar.hf` costs transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar import batching, comm, hf, kernels, kv, layers, partition, plan, ragged
    from seqpar.comm import init_mesh

    __version__: str

__all__ = [
    "__version__",
    "batching",
    "comm",
    "hf",
    "init_mesh",
    "kernels",
    "kv",
    "layers",
    "partition",
    "plan",
    "ragged",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("seqpar")
    elif name == "init_mesh":
        value = importlib.import_module("seqpar.comm").init_mesh
    elif name in __all__:
        try:
            value = importlib.import_module(f"seqpar.{name}")
        except ModuleNotFoundError as error:
            if name != "hf" or (error.name or "").startswith("seqpar"):
                raise
            what = f"`seqpar.hf` must find Transformers, got no module {error.name!r}; pip install 'seqpar[hf]'"
            raise ModuleNotFoundError(what, name=error.name) from None
    else:
        raise AttributeError(f"module 'seqpar' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
