"""Ulysses attention: tokens become heads and back, with one all-to-all each way.

Every rank of the sequence group holds a slice of the tokens of the fused QKV projection. One all-to-all gives it all
tokens of its own heads, the KV heads that several ranks need being replicated in the send buffer; it appends them to
its cache, attends over whole sequences, and a second all-to-all returns the output to the token slices. The received
buffer is used as it arrived: tokens come in rank order, so nothing is unpacked.

Rotary embedding and q/k norms are applied after the first all-to-all, to the heads that the rank owns. Before it they
would cost the same, but need a second pass over the send buffer or an in-place write that training cannot undo; with
replicated KV heads the late form repeats them once per replica, which is small beside attention. On a GPU, where the
send buffer is filled by a kernel that does both on the way, and no gradient is wanted, they are applied there, and no
pass is left but those of packing and attention. Values are the same: a head meets the same numbers on either side.

Source: DeepSpeed-Ulysses (arXiv:2309.14509) exchanges q, k and v in three calls and refuses what does not divide; the
fused form with replicated KV heads is Shift Parallelism's (arXiv:2509.16495).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Mark, ProcessGroup, Steps
from seqpar.kernels import attention, choose_backend, norm_rotary, rotary
from seqpar.kernels.columns import KEY, OTHER, QUERY, ColumnPlan, Norm, pack_heads
from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.quantize import Wire, check_wire
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers.base import check_new, drop_child_names, find_layout
from seqpar.layers.heads import HeadParameter
from seqpar.layers.norm import is_plain
from seqpar.partition import HeadMap, Layout, Range, even_ranges, even_split, layout_names
from seqpar.ragged import RaggedBatch, Tail

__all__ = ["UlyssesAttention"]


class _Exchange(NamedTuple):
    """What travels in one layout: the group, and the columns that each of its ranks receives and returns.

    `heads` has the received ones as heads, with what each is.
    """

    group: ProcessGroup
    columns: tuple[tuple[Range, ...], ...]
    widths: tuple[int, ...]
    heads: ColumnPlan


class UlyssesAttention(nn.Module):
    """Causal attention over a ragged batch whose tokens are sharded over `group`.

    A group of one rank is plain attention over the local heads, as tensor parallelism needs it.

    Args:
        heads: who owns which heads; its sp must be the size of `group`.
        head_dim: D.
        group: the sequence ranks.
        tp_rank: which tensor-parallel shard of the heads the QKV columns are.
        q_norm, k_norm: applied to each head before the rotary embedding (Qwen3).
        sinks: a score of each query head that joins its softmax and has no value (gpt-oss).
        window: visible keys including the query's own; None for all.
        softmax_scale: factor of the scores; 1/sqrt(D) by default.
        layer_index: which layer of the cache this is.
        wire: the format in which both all-to-alls send; see `seqpar.comm.wire`.
    """

    label: str = ""
    unnamed: ClassVar[tuple[str, ...]] = ("sinks",)
    segments: ClassVar[tuple[str, ...]] = ("turn", "norm_turn")
    turn, norm_turn = staticmethod(rotary), staticmethod(norm_rotary)

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        tp_rank: int = 0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        sinks: HeadParameter | None = None,
        window: int | None = None,
        softmax_scale: float | None = None,
        layer_index: int = 0,
        wire: Wire | None = None,
    ) -> None:
        super().__init__()
        check_wire(wire)
        check_new(None, head_dim=head_dim)
        if heads.sp != group.size() or not 0 <= tp_rank < heads.tp:
            raise ValueError(
                f"`heads` must be split over the group's {group.size()} sequence ranks and hold tp rank {tp_rank}, "
                f"got tp={heads.tp}, sp={heads.sp}"
            )
        if window is not None and window < 1:
            raise ValueError(f"`window` must be at least 1 key or None, got {window}")
        self.heads, self.head_dim, self.window, self.layer_index = heads, head_dim, window, layer_index
        self.wire = wire
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.q_norm, self.k_norm = q_norm, k_norm
        self.rank = tp_rank * heads.sp + group.rank()
        self.sinks = sinks
        if sinks is not None:
            self._check_sinks(sinks)
            drop_child_names(self, self.unnamed)
        self.num_heads, self.num_kv_heads = heads.q_ranges[self.rank].size, heads.kv_ranges[self.rank].size
        kv_head_of = heads.kv_head_of(self.rank)
        self.kv_head_of = None if uniform(kv_head_of, self.num_kv_heads) else kv_head_of
        self.exchanges: dict[Layout | None, _Exchange] = {}
        self.exchanges[None] = self.exchanges[heads.layout] = self._exchange(heads, group, tp_rank)

    def add_layout(self, layout: Layout, *, group: ProcessGroup) -> None:
        """Make `steps(qkv, layout=layout)` available over `group`, that layout's sequence ranks.

        Raises:
            ValueError: `layout` gives this rank other heads, or `group` has another size than its sp.
        """
        if layout.size != self.heads.size or layout.sp != group.size() or self.rank % layout.sp != group.rank():
            raise ValueError(
                f"`layout` must place flat rank {self.rank} of {self.heads.size} at rank {group.rank()} of a group of "
                f"{group.size()}, got {layout}; layouts of these ranks are "
                f"{layout_names(Layout(1, self.heads.size).reachable)}"
            )
        self.exchanges[layout] = self._exchange(self.heads.on(layout), group, self.rank // layout.sp)

    def pack(self, q: Float[Tensor, "t h d"], k: Float[Tensor, "t g d"], v: Float[Tensor, "t g d"]) -> Tensor:
        """Lay separate projections out as `steps` takes them: [T, C] in the order of `HeadMap.storage`.

        Raises:
            ValueError: shapes that are not those of this shard's heads.
        """
        tp_rank = self.rank // self.heads.sp
        heads = self.heads.q_shard(tp_rank).size, *[self.heads.kv_shard(tp_rank).size] * 2
        expected = [(len(q), each, self.head_dim) for each in heads]
        if [tuple(x.shape) for x in (q, k, v)] != expected:
            raise ValueError(
                f"`q`, `k` and `v` must have shapes {expected}, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        stored = {
            "q": (self.heads.q_shard(tp_rank).start, q),
            "kv": (self.heads.kv_shard(tp_rank).start, rearrange([k, v], "two t g d -> t g (two d)")),
        }
        parts = []
        for kind, heads in self.heads.storage(tp_rank):
            first, rows = stored[kind]
            parts.append(rearrange(rows[:, heads.start - first : heads.stop - first], "t h d -> t (h d)"))
        return torch.cat(parts, dim=1)

    def unpack(
        self, qkv: Float[Tensor, "t c"], *, layout: Layout | None = None
    ) -> tuple[Float[Tensor, "t h d"], Float[Tensor, "t g d"], Float[Tensor, "t g d"]]:
        """`pack` undone: q, k and v of the shard that this rank has in `layout`, heads in order.

        Raises:
            ValueError: columns that are not those of this shard's heads, or a layout of other ranks.
        """
        heads = self.heads if layout is None else self.heads.on(layout)
        width = heads.width(self.rank // heads.sp) * self.head_dim
        if qkv.shape[1] != width:
            raise ValueError(f"`qkv` must have {width} columns, got {qkv.shape[1]}")
        columns = qkv.unflatten(1, (-1, self.head_dim))
        parts: dict[str, list[Tensor]] = {"q": [], "kv": []}
        for segment, at in heads.offsets(self.rank // heads.sp):
            width = segment.heads.size * (1 if segment.kind == "q" else 2)
            parts[segment.kind].append(columns[:, at : at + width])
        q, pairs = (torch.cat(found, 1) for found in parts.values())
        k, v = rearrange(pairs, "t (g two) d -> two t g d", two=2)
        return q, k, v

    def steps(
        self,
        qkv: Float[Tensor, "t_local c"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
    ) -> Steps[Float[Tensor, "t_out o"]]:
        """See `forward`; yields at the two all-to-alls, with a `Mark` where the KV is appended between them."""
        exchange = find_layout(self.exchanges, layout)
        tokens = even_split(batch.num_tokens, exchange.group.size())
        self._check(qkv, tokens[exchange.group.rank()], exchange)
        self._check_step(qkv, batch, cos, sin, kv, tail)
        pack = self._packing(qkv, cos, sin, exchange)
        mine = yield from comm.seq_to_heads_steps(
            qkv,
            columns=exchange.columns,
            tokens=tokens,
            group=exchange.group,
            label=self.label,
            wire=self.wire,
            head_dim=self.head_dim,
            pack=pack,
        )
        q, k, v = self._split(mine)
        k = k if pack else self.prepare(self.k_norm, k, cos, sin)
        if tail is not None:
            q = tail.take(q)
            cos, sin = (None, None) if cos is None or sin is None else (tail.take(cos), tail.take(sin))
            slices = even_ranges(batch.num_tokens, exchange.group.size())
            tokens = tuple(len(tail.within(*rows)) for rows in slices)
        q = q if pack else self.prepare(self.q_norm, q, cos, sin)
        yield Mark(self.layer_index)
        out = self._attend(q, k, v, batch, kv, tail)
        if tail is not None and not tail.rows:
            return out.new_empty(0, sum(exchange.widths))
        return (
            yield from comm.heads_to_seq_steps(
                out.flatten(1),
                widths=exchange.widths,
                tokens=tokens,
                group=exchange.group,
                label=self.label,
                wire=self.wire,
                head_dim=self.head_dim,
            )
        )

    def forward(
        self,
        qkv: Float[Tensor, "t_local c"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        tail: Tail | None = None,
    ) -> Float[Tensor, "t_out o"]:
        """Attend.

        In:    qkv[T/sp, C]: `even_split` of the batch's tokens; this tp shard's columns in `HeadMap.storage` order.
        Out:   [T/sp, H/tp * D], the same tokens (with `tail`, those of them that are in it), query heads in order.
        Grad:  placed as the inputs; gradients of replicated KV heads are summed on the way back.
        Comm:  each rank sends (q + k + v heads of the others) * D * T/sp elements, then as many for its output heads.

        Args:
            qkv: the fused projection.
            batch: the step's tokens, all of them, the same on every rank.
            cos: rotary table of all T tokens; None leaves q and k as they are.
            sin: the same, sine.
            kv: the cache of this rank's heads. New keys and values are appended at `batch.slots`; None attends among
                the new tokens alone.
            layout: one that `add_layout` recorded; the stored one by default.
            tail: attend with these queries only; all keys and values are appended. Without rows it ends there.

        Raises:
            ValueError: tokens or columns that are not the batch's or the head map's; a gradient that would have to
                flow into cached keys; another batch's tail.
        """
        return comm.run(self.steps(qkv, batch, cos, sin, kv, layout=layout, tail=tail))

    def _exchange(self, heads: HeadMap, group: ProcessGroup, tp_rank: int) -> _Exchange:
        columns = tuple(tuple(r.scale(self.head_dim) for r in ranges) for ranges in heads.columns(tp_rank))
        widths = tuple(width * self.head_dim for width in heads.out_widths(tp_rank))
        kinds = (
            kind
            for segment in heads.storage(tp_rank)
            for kind in ((QUERY,) if segment.kind == "q" else (KEY, OTHER)) * segment.heads.size
        )
        blocks = (tuple(head for r in ranges for head in range(*r)) for ranges in heads.columns(tp_rank))
        return _Exchange(group, columns, widths, ColumnPlan(tuple(blocks), self.head_dim, tuple(kinds)))

    def _packing(
        self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, exchange: _Exchange
    ) -> Callable[[Tensor], Tensor] | None:
        """What fills the send buffer with heads that are normed and turned, where a kernel does it on the way.

        A wire format would round other numbers then, so with one they are prepared where they arrive.
        """
        group, triton = exchange.group, choose_backend("columns", qkv.device, qkv.dtype) == "triton"
        if not triton or group.size() == 1 or self.wire is not None or cos is None or sin is None:
            return None
        norms: list[Norm | None] = []
        for norm in (self.q_norm, self.k_norm):
            if norm is not None and not is_plain(norm):
                return None
            norms.append(None if norm is None else (norm.weight, norm.eps))
        inputs = [qkv, cos, sin, *(norm[0] for norm in norms if norm is not None)]
        if wants_grad(*inputs) or any(tensor.dtype != qkv.dtype for tensor in inputs) or self.head_dim % 2:
            return None
        rows = slice(*even_ranges(len(cos), group.size())[group.rank()])
        q_norm, k_norm = norms
        return partial(pack_heads, plan=exchange.heads, cos=cos[rows], sin=sin[rows], q_norm=q_norm, k_norm=k_norm)

    def _check(self, qkv: Tensor, tokens: int, exchange: _Exchange) -> None:
        comm.refuse_dtensor(qkv, "qkv")
        columns = max(r.stop for ranges in exchange.columns for r in ranges)
        if qkv.ndim != 2 or tuple(qkv.shape) != (tokens, columns):
            raise ValueError(
                f"`qkv` must have shape [{tokens}, {columns}] (this rank's tokens, its shard's heads), "
                f"got {list(qkv.shape)}"
            )

    def _check_step(
        self,
        qkv: Tensor,
        batch: RaggedBatch,
        cos: Tensor | None,
        sin: Tensor | None,
        kv: PagedKV | None,
        tail: Tail | None,
    ) -> None:
        """Refuse what the second half of the step would, before the first collective."""
        if tail is not None and tail.whole is not batch:
            raise ValueError("`tail` must be of this `batch`, got another's; make it by `batch.tail(rows)`")
        self.check_tables(batch, cos, sin)
        self._check_cache(qkv, batch, kv)

    def check_tables(self, batch: RaggedBatch, cos: Tensor | None, sin: Tensor | None) -> None:
        table = (batch.num_tokens, self.head_dim)
        if (cos is None) != (sin is None):
            raise ValueError(f"`cos` and `sin` must be given together, got {type(cos).__name__}, {type(sin).__name__}")
        if cos is not None and sin is not None and not (tuple(cos.shape) == tuple(sin.shape) == table):
            raise ValueError(
                f"`cos` and `sin` must have shape {list(table)} (all tokens of the batch), "
                f"got {list(cos.shape)} and {list(sin.shape)}"
            )

    def _check_cache(self, qkv: Tensor, batch: RaggedBatch, kv: PagedKV | None) -> None:
        """Refuse a cache, or the lack of one, that does not fit the step."""
        prefixed = batch.kv_lens != batch.q_lens
        if kv is None:
            if prefixed:
                raise ValueError("`kv` must be given for a batch with cached tokens, got None")
            return
        if prefixed and torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("`kv` must be empty where gradients are wanted, got cached tokens; use torch.no_grad()")
        if isinstance(kv, StripedKV):
            raise ValueError(
                "`kv` must hold whole sequences of this rank's heads (`PagedKV`), got striped tokens (`StripedKV`); "
                "use `QShipDecodeAttention`, or move them by `stripes_to_heads`"
            )
        pages, _ = kv.layer(self.layer_index)
        wanted, got = (self.num_kv_heads, self.head_dim, qkv.dtype), (*pages.shape[2:], kv.dtype)
        if wanted != got:
            raise ValueError(
                f"`kv` must hold this rank's KV heads {wanted} (heads, head_dim, dtype; `heads.kv_ranges` has those of "
                f"every rank), got {got}"
            )

    def _split(self, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (q | k0 v0 k1 v1 ...) * D] to views q[T, H, D], k[T, G, D], v[T, G, D]."""
        tokens, queries = len(mine), self.num_heads * self.head_dim
        q = mine[:, :queries].view(tokens, self.num_heads, self.head_dim)
        k, v = mine[:, queries:].view(tokens, self.num_kv_heads, 2, self.head_dim).unbind(2)
        return q, k, v

    def prepare(self, norm: nn.Module | None, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Norm and turn heads."""
        if cos is None or sin is None:
            return x if norm is None else norm(x)
        if norm is not None and is_plain(norm):
            return self.norm_turn(x, norm.weight, norm.eps, cos, sin)
        return self.turn(x if norm is None else norm(x), cos, sin)

    def _check_sinks(self, sinks: HeadParameter) -> None:
        """Refuse sinks that are not one number for each query head of this rank."""
        found = sinks.heads.on(self.heads.layout) if sinks.heads.size == self.heads.size else sinks.heads
        if (found, sinks.group.rank(), sinks.shape) != (self.heads, self.rank, ()):
            raise ValueError(
                f"`sinks` must be a number for each of the heads of flat rank {self.rank} of {self.heads}, got "
                f"{sinks.shape} for each of those of rank {sinks.group.rank()} of {sinks.heads}"
            )

    def _attention_options(self, q_heads: Range, kv_head_of: tuple[int, ...] | None) -> dict[str, Any]:
        """What the kernel is to know, of local query heads that read their KV heads by `kv_head_of`."""
        return {
            "sinks": None if self.sinks is None else self.sinks()[slice(*q_heads)],
            "softmax_scale": self.softmax_scale,
            "window": self.window,
            "kv_head_of": kv_head_of,
            "deterministic": comm.is_deterministic(self.exchanges[None].group),
        }

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, kv: PagedKV | None, tail: Tail | None
    ) -> Tensor:
        options = self._attention_options(Range(0, self.num_heads), self.kv_head_of)
        if kv is not None:
            kv.append(self.layer_index, k.detach(), v.detach(), batch)
        if batch.kv_lens == batch.q_lens:
            return attention(q, k, v, (tail or batch).without_cache, **options)[0]
        assert kv is not None, "`_check_step` refuses cached tokens without a cache"
        k, v = kv.read(self.layer_index, batch)
        options["scales"] = kv.scales(self.layer_index)
        return attention(q, k, v, batch if tail is None else tail.batch, **options)[0]


def uniform(kv_head_of: tuple[int, ...], num_kv_heads: int) -> bool:
    """Whether every KV head serves the same number of consecutive query heads, which kernels assume by default."""
    if num_kv_heads == 0 or len(kv_head_of) % num_kv_heads:
        return not kv_head_of
    ratio = len(kv_head_of) // num_kv_heads
    return kv_head_of == tuple(i // ratio for i in range(len(kv_head_of)))
