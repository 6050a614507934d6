"""Attention over tokens that stay on their ranks, as a layer of a model needs it: norms, rotary embedding and a cache.

`RingAttention` and `CSAAttention` take queries, keys and values of tokens that lie on the ranks by a placement.
`PlacedCore` takes the fused projection of those tokens instead, and stands where `UlyssesAttention` stands. The
placement is not made here: whoever embeds the tokens of a step picks the rows of each rank (`placed_rows`), once for
all layers, and puts the last layer's rows back in order.

New keys and values go to a striped cache, whatever the placement: it stays balanced as requests grow, decodes that
ship queries read it as it is, and so does the next prompt of a request, whose cached tokens are one more block on every
rank. Where the new tokens are striped as the cache is, each rank appends its own; from any other placement they travel
to their owners in one all-to-all a layer. A cache in the placement of the prompt lost: zig-zag chunks of several
prompts leave a request in pieces that no page holds, and the decodes all on one rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Mark, Steps
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers.csa import CSAAttention
from seqpar.layers.ring import CachedKV, RingAttention, place_lens, placed_rows
from seqpar.layers.striped import check_striped, tokens_to_stripes_steps
from seqpar.layers.ulysses import UlyssesAttention
from seqpar.partition import Range
from seqpar.ragged import RaggedBatch

__all__ = ["PlacedCore"]


class PlacedCore(nn.Module):
    """Causal attention over tokens that lie on the ranks by a placement; it stands where `UlyssesAttention` does.

    Args:
        inner: attends with queries, keys and values.
        beside: the layer in whose place it stands: its heads, norms and place in the cache are this one's too.

    Raises:
        ValueError: the layer beside has other heads or sinks, another scale or window.
    """

    def __init__(self, inner: RingAttention | CSAAttention, *, beside: UlyssesAttention) -> None:
        super().__init__()
        tp_rank = beside.rank // beside.heads.sp
        shard = beside.heads.q_shard(tp_rank).size, beside.heads.kv_shard(tp_rank).size
        wanted = (*shard, beside.head_dim, beside.window, beside.softmax_scale)
        found = (inner.num_heads, inner.num_kv_heads, inner.head_dim, inner.window, inner.softmax_scale)
        if wanted != found or inner.group.size() != beside.heads.sp:
            raise ValueError(
                f"`inner` must have the heads, head_dim, window and scale of the layer beside it {wanted} over "
                f"{beside.heads.sp} ranks, got {found} over {inner.group.size()}"
            )
        if beside.sinks is not getattr(inner, "sinks", None):
            raise ValueError(
                f"`inner` must have the sinks of the layer beside it, got {type(inner).__name__} without; pass them to "
                "`RingAttention`, or use another layer"
            )
        self.inner, self.beside = inner, beside

    @property
    def label(self) -> str:
        """Names its collectives."""
        return self.inner.label

    @label.setter
    def label(self, label: str) -> None:
        self.inner.label = label

    def rows(self, batch: RaggedBatch) -> Int64[Tensor, " t_local"]:
        """Which of the batch's tokens this rank holds, in the order in which the layer takes them."""
        return self.inner.rows(batch)

    def steps(
        self,
        qkv: Float[Tensor, "t_local c"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
    ) -> Steps[Float[Tensor, "t_local o"]]:
        """See `forward`; yields where the tokens are moved to the cache, and where the attention does."""
        rows, core = self.rows(batch), self.beside
        self._check(qkv, batch, cos, sin, kv, len(rows))
        q, k, v = core.unpack(qkv)
        if cos is not None and sin is not None:
            cos, sin = cos[rows], sin[rows]
        q, k = core.prepare(core.q_norm, q, cos, sin), core.prepare(core.k_norm, k, cos, sin)
        cached = None
        if kv is not None:
            assert isinstance(kv, StripedKV), "`_check` refuses others"
            yield from self._append_steps(k, v, batch, kv)
            cached = self._prefix(batch, kv)
        out: Tensor = yield from self.inner.steps(q, k, v, batch, cached)
        return out.flatten(1)

    def forward(
        self,
        qkv: Float[Tensor, "t_local c"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
    ) -> Float[Tensor, "t_local o"]:
        """Attend.

        In:    qkv[T/sp, C]: the tokens `rows(batch)`, this tp shard's columns in `HeadMap.storage` order.
        Out:   [T/sp, H/tp * D], the same tokens, query heads in order.
        Grad:  placed as the inputs, where the attention has gradients.
        Comm:  what the attention sends; with a cache whose tokens are striped otherwise, an all-to-all of K and V.

        Args:
            qkv: the fused projection.
            batch: the step's tokens, all of them, the same on every rank.
            cos: rotary table of all T tokens; None leaves q and k as they are.
            sin: the same, sine.
            kv: the `StripedKV` of this rank, which made the batch. None attends among the new tokens alone.

        Raises:
            ValueError: tokens or columns that are not the batch's or the head map's; a cache of another placement, or
                of other ranks; a gradient that would have to flow into cached keys.
        """
        return comm.run(self.steps(qkv, batch, cos, sin, kv))

    def _append_steps(self, k: Tensor, v: Tensor, batch: RaggedBatch, kv: StripedKV) -> Steps[None]:
        """Bring the new keys and values to the ranks that cache them."""
        inner, layer = self.inner, self.beside.layer_index
        if (inner.placement, inner.interleave) == ("striped", kv.striping.interleave):
            yield Mark(layer)
            kv.append_own(layer, k, v, batch)
            return
        yield Mark(layer, closes=False)
        rows = placed_rows(batch, inner.group.size(), inner.placement, interleave=inner.interleave)
        yield from tokens_to_stripes_steps(
            k, v, batch, kv, layer_index=layer, rows=rows, group=inner.group, label=self.label
        )
        yield Mark(layer, opens=False)

    def _prefix(self, batch: RaggedBatch, kv: StripedKV) -> CachedKV | None:
        """What this rank caches of the tokens before the step."""
        lens = [keys - new for keys, new in zip(batch.kv_lens, batch.q_lens, strict=True)]
        if not any(lens):
            return None
        key = ("placed.prefix", kv.striping, kv.rank)
        if key not in batch.plans:
            each = zip(batch.pages, kv.context(batch), strict=True)
            slots = [kv.slots(pages, Range(0, own)) for pages, own in each]
            striping = kv.striping
            with torch.inference_mode(False):
                index = torch.cat(slots).to(kv.device)
            batch.plans[key] = index, place_lens(lens, striping.ranks, "striped", interleave=striping.interleave)
        index, held = batch.plans[key]
        k, v = (x.flatten(0, 1)[index] for x in kv.read(self.beside.layer_index, batch))
        return CachedKV(k, v, held)

    def _check(
        self,
        qkv: Tensor,
        batch: RaggedBatch,
        cos: Tensor | None,
        sin: Tensor | None,
        kv: PagedKV | None,
        tokens: int,
    ) -> None:
        comm.refuse_dtensor(qkv, "qkv")
        core, group = self.beside, self.inner.group
        shape = (tokens, core.heads.width(core.rank // core.heads.sp) * core.head_dim)
        if tuple(qkv.shape) != shape:
            raise ValueError(
                f"`qkv` must have shape {list(shape)} (the tokens `rows(batch)`, its shard's heads), "
                f"got {list(qkv.shape)}"
            )
        core.check_tables(batch, cos, sin)
        if kv is None:
            return
        check_striped(kv, batch, group=group, heads=self.inner.num_kv_heads, head_dim=core.head_dim, dtype=qkv.dtype)
        if batch.kv_lens != batch.q_lens and torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("`kv` must be empty where gradients are wanted, got cached tokens; use torch.no_grad()")
