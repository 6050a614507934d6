"""The names that yunchang and ring-flash-attn import; see the package."""

from typing import Any, NoReturn

import torch
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


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """The same with the log-sum-exp [B, H, S], as a ring's steps need it; causal ones have as many keys as queries."""
    plain = (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    if dropout_p or not plain or return_softmax or (causal and q.shape[1] != k.shape[1]):
        raise NotImplementedError("the stand-in for flash_attn has neither dropout, windows, soft caps nor slopes")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, is_causal=causal, scale=softmax_scale
    )
    return out.transpose(1, 2), lse, None, None


def _not_here(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("the stand-in for flash_attn has no backward pass and no packed sequences")


_flash_attn_backward = _not_here
_flash_attn_varlen_forward = _flash_attn_varlen_backward = _not_here
