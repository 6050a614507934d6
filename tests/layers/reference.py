"""The unsharded layers in one process: the oracle, written for reading, run in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqpar.kv import PagedKV


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Attention(nn.Module):
    """Causal attention of flat tokens [T, M] whose requests have lengths `q_lens`; no cache."""

    def __init__(
        self, size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, size, bias=bias)
        if qk_norm:
            self.q_norm, self.k_norm = Norm(head_dim), Norm(head_dim)

    def forward(self, x: Tensor, q_lens: tuple[int, ...], cos: Tensor, sin: Tensor, window: int | None) -> Tensor:
        q, k, v = (proj(x).unflatten(1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = [attend(*qkv, window) for qkv in zip(*(t.split(q_lens) for t in (q, k, v)), strict=True)]
        return self.o_proj(torch.cat(out).flatten(1))


class MLP(nn.Module):
    def __init__(self, size: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=bias)
        self.up_proj = nn.Linear(size, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A Llama decoder layer over flat tokens."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden: int,
        *,
        bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(size, num_heads, num_kv_heads, head_dim, bias=bias, qk_norm=qk_norm)
        self.mlp = MLP(size, hidden, bias=bias)
        self.input_layernorm, self.post_attention_layernorm = Norm(size), Norm(size)

    def forward(
        self, x: Tensor, q_lens: tuple[int, ...], cos: Tensor, sin: Tensor, window: int | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), q_lens, cos, sin, window)
        return x + self.mlp(self.post_attention_layernorm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None = None) -> Tensor:
    """One request: q [T, H, D], k and v [T, G, D], a sink for each of H heads."""
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    age = torch.arange(len(q))[:, None] - torch.arange(len(q))
    visible = (age >= 0) & (age < (window or len(q)))
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v)


def rope(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()


def name_of(layout: tuple[int, int]) -> str:
    """Test id of a layout."""
    return f"tp{layout[0]}-sp{layout[1]}"


def written_rows(kv: PagedKV) -> list[int]:
    """Rows of the cache, counted over all its pages, that hold a token."""
    size = kv.page_size
    return sorted(kv.pages(id)[t // size] * size + t % size for id in kv.ids for t in range(kv.length(id)))
