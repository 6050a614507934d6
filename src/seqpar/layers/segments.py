"""The named pieces of local work between the yields of layers, each compiled as one graph.

A layer's program is left as it is, so that schedules, hooks and layouts are too: what runs between two yields is made
of functions of tensors alone, which layers hold by name (their `segments`), and each of these is compiled. The
alternative that lost is to compile a whole layer: its collectives would be waited for inside of the graph, where no
schedule can hide them.

Matrix products, attention and experts are no segments. A product is one operator, of the library that suits its shape.
Attention follows host integers of the batch, and experts follow the data: they would be compiled anew at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["compile_segments", "restore_segments"]


def compile_segments(root: nn.Module, **options: Any) -> tuple[str, ...]:
    """Compile the segments of every layer below `root`, until `restore_segments`.

    They are compiled when they first run, and again for what PyTorch takes to be another shape.

    Args:
        root: a layer, or a model of layers.
        options: those of `torch.compile` but for `fullgraph`, which is True.

    Returns:
        Dotted names of the segments.

    Raises:
        ValueError: nothing below `root` has segments.
    """
    found = tuple(_segments(root))
    if not found:
        raise ValueError(
            f"`root` must hold a layer with named segments, got {type(root).__name__} without; "
            "products, attention and experts run as they are"
        )
    for _, module, name in found:
        setattr(module, name, torch.compile(getattr(type(module), name), fullgraph=True, **options))
    return tuple(f"{path}.{name}" if path else name for path, _, name in found)


def restore_segments(root: nn.Module) -> None:
    """Have the segments of every layer below `root` run eagerly again."""
    for _, module, name in _segments(root):
        module.__dict__.pop(name, None)


def _segments(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The path of a layer, the layer, and the name of one of its segments."""
    for path, module in root.named_modules():
        for name in getattr(type(module), "segments", ()):
            yield path, module, name
