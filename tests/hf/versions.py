"""What the newest Transformers do, on older ones too: there it is worked out from what they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils
from transformers.utils import output_capturing

__all__ = ["TAKES_ROWS", "enable_checkpointing", "hidden_states", "kept"]


TAKES_ROWS = hasattr(modeling_utils, "slice_logits_to_keep")
"""Whether `logits_to_keep` may say which columns of each row."""


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor) and keep.ndim == 2:
        return x[keep] if keep.dtype == torch.bool else x.take_along_dim(keep[..., None], 1)
    return x[:, -keep:] if isinstance(keep, int) else x[:, keep]


kept = getattr(modeling_utils, "slice_logits_to_keep", _kept)
"""The columns of x[B, S, M] that `logits_to_keep` asks for."""


def hidden_states(model: Any, ids: Tensor, which: bool | int | list[int]) -> tuple[Tensor | None, ...]:
    """Transformers' hidden states, None where not asked for; 5.17 takes an index for a flag, and counts otherwise."""
    if hasattr(output_capturing, "selected_hidden_states"):
        return tuple(model(ids, output_hidden_states=which).hidden_states)
    states = tuple(model(ids, output_hidden_states=True).hidden_states)
    if which is True:
        return states
    wanted = {index % len(states) for index in ([which] if isinstance(which, int) else which) if index < len(states)}
    return tuple(state if index in wanted else None for index, state in enumerate(states))


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing, under the name that it has."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
