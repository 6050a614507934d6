"""Which attention a step takes, and where the cache lies: `prefill=` and `decode=`.

A cache lies by heads (whole sequences of each rank's own heads, as Ulysses and tensor parallelism read them) or by
tokens (dealt out over the sequence ranks, as rings leave them and decodes that ship queries read them). Every prefill
has the one or the other as its home:

    prefill="ulysses"                by heads
    prefill="ring", CSA(...)         by tokens

A first prompt is computed by `prefill` and cached at its home. A decode (at most one new token of each request, over a
cache) is computed where `decode` says. A cache that is not there yet is moved, with all its requests and layers, and
stays: it is moved once at most, until it is emptied. A later prompt goes where the cache lies: by heads to Ulysses, by
tokens to the prefill that lives there, or else to the shipping of queries. So any pair of options serves any order of
prompts and decodes, and the rule depends on lengths alone, which all ranks know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from seqpar.comm import Groups, Wire
from seqpar.hf.auto import AutoOverlap
from seqpar.hf.decode import AutoDecode
from seqpar.kernels import RopeConfig
from seqpar.layers import (
    Certified,
    CSAAttention,
    ParallelAttention,
    PlacedCore,
    Policy,
    QShipDecodeAttention,
    RingAttention,
)
from seqpar.layers.csa.core import Exchange
from seqpar.partition import HeadMap, Placement, Striping, ThreePhase
from seqpar.plan import RingCase

__all__ = ["CSA", "Attend", "Decode", "Home", "Path", "Prefill", "add_cores", "check_methods", "rope_of", "turned_by"]


@dataclass(frozen=True)
class CSA:
    """Prompts by communication-efficient sparse attention: `prefill=CSA(policy)`, `CSA(policy, exchange="ulysses")`.

    Results are the model's own only as far as the policy says (`seqpar.layers.csa`). A `Certified` that names no rotary
    embedding gets the model's, since keys then take fewer bits.

    Args:
        policy: what travels.
        exchange: whether queries stay with their tokens, or travel to the ranks of their heads; see `CSAAttention`.

    Raises:
        TypeError: it is no policy.
        ValueError: an exchange that is none.
    """

    policy: Policy
    exchange: Exchange = "ring"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise TypeError(f"`policy` must be a Policy such as layers.TopMass, got {self.policy!r}")
        if self.exchange not in get_args(Exchange):
            raise ValueError(f'`exchange` must be "ring" or "ulysses", got {self.exchange!r}')


Prefill = Literal["ulysses", "ring"] | CSA
Decode = Literal["local", "qship", "auto"] | AutoDecode
Home = Literal["heads", "tokens"]

QSHIP, RING, RING_Q, SPARSE = "qship", "ring", "ring-q", "csa"
_RING: Placement = "striped"  # as the cache is, so that a ring leaves nothing to be moved
_SPARSE: Placement = "contiguous"


class Path(NamedTuple):
    """How one step attends.

    Attributes:
        core: the core of the layers (`ParallelAttention.add_core`); None for the usual one.
        home: where the cache is to lie.
        placement: of the tokens over the sequence ranks; None for even slices of all of them.
    """

    core: str | None
    home: Home
    placement: Placement | None = None


class Attend:
    """What `prefill=` and `decode=` come to, for each step the same on every rank.

    Args:
        prefill: of prompts.
        decode: of decodes.
        heads: who owns which heads.
        head_dim: D.

    Attributes:
        auto: what decides where decodes are computed; None where that is given.
    """

    def __init__(
        self, prefill: Prefill = "ulysses", decode: Decode = "local", *, heads: HeadMap, head_dim: int
    ) -> None:
        self.prefill, self.decode, self.heads, self.head_dim = prefill, decode, heads, head_dim
        self.auto = AutoDecode() if decode == "auto" else decode if isinstance(decode, AutoDecode) else None
        self.striping = Striping(heads.sp)

    @property
    def home(self) -> Home:
        """Where a first prompt leaves its keys and values."""
        return "heads" if self.prefill == "ulysses" else "tokens"

    @property
    def stripes(self) -> bool:
        """Whether a cache may come to lie by tokens."""
        return self.home == "tokens" or self.decode != "local"

    def path_of(
        self,
        q_lens: Sequence[int],
        cached: Sequence[int],
        home: Home,
        *,
        itemsize: int,
        measure: Callable[[], None] | None = None,
    ) -> Path:
        """How a step attends.

        Args:
            q_lens: new tokens of each request.
            cached: tokens of each that are cached; none at all for a first prompt.
            home: where the cache lies, if there is something in it.
            itemsize: bytes of an element.
            measure: called before the first decision of `auto`.
        """
        if not any(cached):
            return self._prompt(q_lens, cached, itemsize)
        if max(q_lens) > 1:
            if home == "heads":
                return Path(None, "heads")
            return Path(QSHIP, "tokens") if self.prefill == "ulysses" else self._prompt(q_lens, cached, itemsize)
        if home == self.home:
            if measure is not None:
                measure()
            ships = self.decode == "qship" if self.auto is None else self.auto.ships(cached)
            home = "tokens" if ships else "heads"
        return Path(None if home == "heads" else QSHIP, home)

    def explain(self) -> str:
        """Where decodes are computed, and why."""
        if self.auto is not None:
            return self.auto.explain()
        if self.decode == "local":
            moved = "; the cache is moved before the first one" if self.home == "tokens" else ""
            return f"as given: every rank decodes with its own heads{moved}"
        moved = "; the cache is moved before the first one" if self.home == "heads" else ""
        return f"as given: queries are shipped to {self.heads.sp} rank(s), which hold a share of the tokens each{moved}"

    def _prompt(self, q_lens: Sequence[int], cached: Sequence[int], itemsize: int) -> Path:
        if self.prefill == "ulysses":
            return Path(None, "heads")
        if isinstance(self.prefill, CSA):
            return Path(SPARSE, "tokens", _SPARSE)
        return Path(RING_Q if self._sends_queries(sum(q_lens), sum(cached), itemsize) else RING, "tokens", _RING)

    def _sends_queries(self, new: int, cached: int, itemsize: int) -> bool:
        """Whether queries and their answers are fewer bytes than keys and values: few new tokens after many."""
        if not cached:
            return False
        shard, kv_shard = self.heads.q_shard(0).size, self.heads.kv_shard(0).size
        case = RingCase(new, cached, self.heads.sp, shard, kv_shard, self.head_dim, itemsize)
        return case.q_bytes + case.answer_bytes < case.kv_bytes


def check_methods(prefill: Any, decode: Any, *, pipeline: ThreePhase | None, wire: Wire | None, overlap: Any) -> None:
    """Refuse options that are none, and those that do not go together.

    Raises:
        TypeError: a prefill or a decode that is none.
        ValueError: a pipeline, a wire format or an automatic overlap beside a prefill that has none.
    """
    if not isinstance(prefill, CSA) and prefill not in ("ulysses", "ring"):
        raise TypeError(f'`prefill` must be "ulysses", "ring" or a CSA, got {prefill!r}')
    if not isinstance(decode, AutoDecode) and decode not in ("local", "qship", "auto"):
        raise TypeError(f'`decode` must be "local", "qship", "auto" or an AutoDecode, got {decode!r}')
    if prefill == "ulysses":
        return
    if wire is not None and prefill != "ring":
        raise ValueError(f"`wire` must be None with prefill={prefill!r}, whose policy says what it sends, got {wire!r}")
    if pipeline is not None:
        raise ValueError(
            f"`pipeline` must be None with prefill={prefill!r}, which has no all-to-alls to cut, got {pipeline}"
        )
    if overlap == "auto" or isinstance(overlap, AutoOverlap):
        raise ValueError(
            f'`overlap` must be "off" or an Interleave with prefill={prefill!r}, which "auto" does not measure, '
            f"got {overlap!r}"
        )


def add_cores(layers: Sequence[nn.Module], attend: Attend, *, groups: Groups, rope: RopeConfig | None) -> None:
    """Give every layer the attention that its steps may take, beside the usual one; `rope` turns their keys."""
    for layer in layers:
        attention = layer.self_attn
        assert isinstance(attention, ParallelAttention), "layers have just been made"
        if attend.stripes:
            attention.add_core(QSHIP, _qship(attention, attend.heads, groups))
        if attend.prefill == "ring":
            attention.add_core(RING, _ring(attention, attend.heads, groups, "kv"))
            attention.add_core(RING_Q, _ring(attention, attend.heads, groups, "q"))
        if isinstance(attend.prefill, CSA):
            policy = turned_by(attend.prefill.policy, rope)
            attention.add_core(SPARSE, _sparse(attention, attend.heads, groups, policy, attend.prefill.exchange))


def rope_of(config: Any, head_dim: int) -> RopeConfig | None:
    """How a model turns its keys; None where the kind is unknown here, or changes from call to call."""
    try:
        parameters = config.rope_parameters or {}
        rope = RopeConfig.from_dict(
            parameters, head_dim=head_dim, max_position_embeddings=config.max_position_embeddings
        )
    except (ValueError, TypeError):
        return None
    return None if rope.depends_on_length else rope


def turned_by(policy: Policy, rope: RopeConfig | None) -> Policy:
    """The policy, told how keys have been turned where that makes them cheaper and it does not say so itself."""
    return replace(policy, rope=rope) if isinstance(policy, Certified) and policy.rope is None else policy


def _qship(attention: ParallelAttention, heads: HeadMap, groups: Groups) -> QShipDecodeAttention:
    core = attention.core
    return QShipDecodeAttention(
        heads,
        core.head_dim,
        group=groups.sp,
        tp_rank=groups.tp.rank(),
        q_norm=core.q_norm,
        k_norm=core.k_norm,
        sinks=core.sinks,
        window=core.window,
        softmax_scale=core.softmax_scale,
        layer_index=core.layer_index,
        wire=core.wire,
    )


def _ring(attention: ParallelAttention, heads: HeadMap, groups: Groups, method: Literal["kv", "q"]) -> PlacedCore:
    core = attention.core
    ring = RingAttention(
        heads,
        core.head_dim,
        group=groups.sp,
        tp_rank=groups.tp.rank(),
        sinks=core.sinks,
        method=method,
        placement=_RING,
        window=core.window,
        softmax_scale=core.softmax_scale,
        wire=core.wire,
    )
    return PlacedCore(ring, beside=core)


def _sparse(
    attention: ParallelAttention,
    heads: HeadMap,
    groups: Groups,
    policy: Policy,
    exchange: Exchange,
) -> PlacedCore:
    core = attention.core
    sparse = CSAAttention(
        heads,
        core.head_dim,
        group=groups.sp,
        policy=policy,
        exchange=exchange,
        tp_rank=groups.tp.rank(),
        placement=_SPARSE,
        window=core.window,
        softmax_scale=core.softmax_scale,
    )
    return PlacedCore(sparse, beside=core)
