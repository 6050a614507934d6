"""The names that yunchang imports; see the package."""

from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor

__all__ = ["flash_attn_func"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **options: Any,
) -> Tensor:
    """Attention over q[B, S, H, D] and k, v[B, S, G, D]."""
    if dropout_p or tuple(window_size) != (-1, -1) or any(options.values()):
        raise NotImplementedError("the stand-in for flash_attn has neither dropout, windows, soft caps nor slopes")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def _not_here(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("the stand-in for flash_attn has only flash_attn_func")


_flash_attn_forward = _flash_attn_backward = _not_here
_flash_attn_varlen_forward = _flash_attn_varlen_backward = _not_here
