"""Communication-efficient sparse attention: every rank keeps the tokens it has, and a policy says what else travels.

The layer owns what policies have in common: where tokens lie, exact attention of a rank's queries to its own keys, and
partials merged by their log-sum-exp in float32. A policy is a program of steps that gets the rank's q, k and v. It
launches what is to come, attends to the rank's own keys meanwhile, and merges what arrives: a ring of fixed hops lost,
since it can forward neither a choice that depends on the receiver nor a message whose size depends on the data.

Source: CSA and its pipeline, CSPS, arXiv:2409.15104v1, as far as its released code shows them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps
from seqpar.layers.ring import CachedKV, PartialSum, PlacedAttention, RingStep
from seqpar.partition import HeadMap, Placement
from seqpar.ragged import RaggedBatch

__all__ = ["CSAAttention", "CSAResult", "Policy", "attend_own"]


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
        tp_rank: which tensor-parallel shard of the heads.
        placement: of the new tokens; see `partition.place_tokens`.
        interleave: neighbours that lie together, of a striped placement.
        window: visible keys including the query's own; None for all.
        softmax_scale: factor of the scores; 1/sqrt(D) by default.

    Raises:
        ValueError: a placement, interleave, window or tp rank that is none; what the policy cannot serve.
    """

    def __init__(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        group: ProcessGroup,
        policy: Policy,
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
        policy.check(self)

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


def attend_own(core: CSAAttention, q: Tensor, kv: Tensor, batch: RaggedBatch, cached: CachedKV | None) -> PartialSum:
    """This rank's queries over its own keys `core.own_keys(...)`, exactly: a sum to which other partials are added."""
    return RingStep(core.ring_core(), core.order(batch, cached), batch, q.dtype).alone(q, kv)
