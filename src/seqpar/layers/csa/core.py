"""Communication-efficient sparse attention: every rank keeps the tokens it has, and a policy says what else travels.

The layer owns what policies have in common: where tokens lie, and where queries meet the keys of other ranks
(`seats`). A policy is a program of steps that gets the rank's q, k and v. It launches what is to come, attends to the
rank's own keys meanwhile, and merges what arrives by its log-sum-exp in float32: a ring of fixed hops lost, since it
can forward neither a choice that depends on the receiver nor a message whose size depends on the data.

Source: CSA and its pipeline, CSPS, arXiv:2409.15104v1, as far as its released code shows them.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps
from seqpar.layers.ring import CachedKV, PlacedAttention
from seqpar.partition import HeadMap, HeadPart, Placement, Range, head_parts
from seqpar.ragged import RaggedBatch

__all__ = ["CSAAttention", "CSAResult", "Exchange", "Policy"]

Exchange = Literal["ring", "ulysses"]


class CSAResult(NamedTuple):
    """What a policy computed, how far it may be off, and what it sent.

    Attributes:
        out: [T/p, H, D], in the dtype of q.
        lse: [T/p, H], natural log, float32 (float64 for float64): the mass of the keys that were attended to.
        bound: [T/p, H], what ‖out - exact‖ is proven not to exceed; None from a policy that proves nothing.
        sent_bytes: by this rank.
        rounds: of messages, each of which needs the one before.
    """

    out: Tensor
    lse: Tensor
    bound: Tensor | None
    sent_bytes: int
    rounds: int


@runtime_checkable
class Policy(Protocol):
    """Which keys travel. A frozen dataclass that refuses values outside its range when it is made."""

    def check(self, core: CSAAttention) -> None:
        """Raise ValueError where this policy cannot serve a layer: its group, heads, placement or window."""

    def steps(
        self,
        core: CSAAttention,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None,
    ) -> Steps[CSAResult]:
        """Attend, as `CSAAttention.attend` says; the layer has checked the arguments."""
        ...


class CSAAttention(PlacedAttention):
    """Causal attention over a ragged batch whose tokens lie on the ranks of `group`, of which a policy sends a part.

    It stands where `RingAttention` stands, for inference: there is no gradient.

    Args:
        heads: who owns which heads; the group holds all of one tensor-parallel shard, so any sp will do.
        head_dim: D.
        group: the sequence ranks.
        policy: what travels: `Strided`, `TopMass`, `Certified`, or one of your own.
        exchange: how keys and queries meet. "ring": queries stay with their tokens, and what the policy sends of a key
            goes to every rank that sees it. "ulysses": queries travel to the ranks of their heads, outputs back, and
            what the policy sends of a key goes to the rank of its head.
        tp_rank: which tensor-parallel shard of the heads.
        placement: of the new tokens; see `partition.place_tokens`.
        interleave: neighbours that lie together, of a striped placement.
        window: visible keys including the query's own; None for all.
        softmax_scale: factor of the scores; 1/sqrt(D) by default.

    Attributes:
        parts: the query heads with which each rank attends beside other ranks' keys, and the KV heads that those read,
            both counted from the shard's first.

    Raises:
        ValueError: a placement, interleave, window, tp rank or exchange that is none; fewer query heads than ranks
            where they are split by heads; what the policy cannot serve.
    """

    unrecorded: ClassVar[str] = "whose policies ask the device what to send"

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        policy: Policy,
        exchange: Exchange = "ring",
        tp_rank: int = 0,
        placement: Placement = "contiguous",
        interleave: int = 1,
        window: int | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__(
            heads,
            head_dim,
            group=group,
            tp_rank=tp_rank,
            placement=placement,
            interleave=interleave,
            window=window,
            softmax_scale=softmax_scale,
        )
        self.policy = policy
        self.exchange: Exchange = exchange
        self.parts = self._split_heads()
        policy.check(self)

    def reads(self, rank: int) -> tuple[int, ...]:
        """Which of the KV heads of `parts[rank]` each of its query heads reads."""
        part = self.parts[rank]
        return tuple(head - part.kv.start for head in self.kv_head_of[slice(*part.q)])

    def steps(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> Steps[Float[Tensor, "t_local h d"]]:
        """`attend_steps`, the output alone."""
        return (yield from self.attend_steps(q, k, v, batch, cached)).out

    def forward(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> Float[Tensor, "t_local h d"]:
        """`attend`, the output alone."""
        return comm.run(self.steps(q, k, v, batch, cached))

    def attend_steps(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> Steps[CSAResult]:
        """See `attend`; yields where the policy waits for what it launched."""
        self._check(q, k, v, batch, cached)
        tensors = (q, k, v) if cached is None else (q, k, v, cached.k, cached.v)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise ValueError(
                "`q`, `k`, `v` and the cached keys must need no gradient, got one that does; use torch.no_grad(), or "
                "RingAttention to train"
            )
        return (yield from self.policy.steps(self, q, k, v, batch, cached))

    def attend(
        self,
        q: Float[Tensor, "t_local h d"],
        k: Float[Tensor, "t_local g d"],
        v: Float[Tensor, "t_local g d"],
        batch: RaggedBatch,
        cached: CachedKV | None = None,
    ) -> CSAResult:
        """Attend.

        In:    q[T/p, H/tp, D]; k, v[T/p, G/tp, D], rotated: the tokens `rows(batch)`, heads of this shard in order.
        Out:   `CSAResult`: the same tokens.
        Grad:  none.
        Comm:  the policy's.

        Args:
            q: queries.
            k: keys.
            v: values.
            batch: the step's tokens, all of them, the same on every rank; its pages are not read.
            cached: earlier tokens of its requests, all of `kv_lens - q_lens`.

        Raises:
            ValueError: as `RingAttention.forward`; a gradient wanted; a batch that the policy cannot serve.
        """
        return comm.run(self.attend_steps(q, k, v, batch, cached))

    def _split_heads(self) -> tuple[HeadPart, ...]:
        ranks = self.group.size()
        if self.exchange not in get_args(Exchange):
            raise ValueError(f'`exchange` must be "ring" or "ulysses", got {self.exchange!r}')
        if self.exchange == "ring":
            return (HeadPart(Range(0, self.num_heads), Range(0, self.num_kv_heads)),) * ranks
        if self.num_heads < ranks:
            raise ValueError(
                f'`heads` must have a query head for each of the {ranks} ranks where `exchange` is "ulysses", got '
                f'{self.num_heads} in the shard; use exchange="ring"'
            )
        parts = head_parts(self.q_shard, self.group_size, ranks)
        q, kv = self.q_shard.start, self.kv_shard.start
        return tuple(HeadPart(part.q.shift(-q), part.kv.shift(-kv)) for part in parts)
