"""Which requests run in the next step, with how many tokens each: a pure function of host integers.

`compose` asks a policy to fill a `Draft`, whose methods know about budgets, memory and age, so that a policy is a
few lines: decodes, then prompts, or one of them. Nothing here knows a tensor or a cache; what a cache has left is a
`Room`. Equal arguments give equal steps, so ranks that see the same requests compose alike without talking.

Age is what keeps every request moving. Requests are admitted first come, first served, and nobody overtakes a head of
the queue that does not fit yet. Where memory runs out the newest gives its pages back and waits at the head of the
queue, so the oldest always has what it needs and all end in finitely many steps.

A step's rows are decodes first, then chunks of prompts: what a decode kernel or a recorded graph serves is a prefix.

Sources: Orca (OSDI'22), SARATHI (arXiv:2308.16369), Sarathi-Serve (arXiv:2403.02310); the pieces left open there (more
decodes than the budget, memory that runs out during a prompt, prompts longer than a step) are defined here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from seqpar.batching.requests import Progress
from seqpar.kv import PagedKV
from seqpar.plan import tile_fit
from seqpar.ragged import RaggedBatch

__all__ = [
    "Admission",
    "Budget",
    "Composer",
    "DecodeMaximal",
    "Draft",
    "Exclusive",
    "FullHybrid",
    "Policy",
    "PrefillFirst",
    "RequestLevel",
    "Room",
    "StallFree",
    "Step",
    "compose",
]

Admission = Literal["whole", "known"]


@dataclass(frozen=True)
class Budget:
    """What a step, and the requests that run at a time, may take at most.

    Args:
        max_tokens: rows of a step, over all requests.
        max_requests: requests that run at a time.
        admission: a request is admitted if the cache can hold it beside those that run, each with all the tokens that
            it may ever have ("whole": then nobody is ever preempted), or with those that are known so far ("known":
            more requests run at a time, and the newest are preempted where memory runs out).
        spare_pages: left free when a request is admitted beside others, for their next tokens.

    Raises:
        ValueError: a budget below one token or one request, negative spare pages.
    """

    max_tokens: int
    max_requests: int
    admission: Admission = "whole"
    spare_pages: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_requests < 1:
            raise ValueError(
                f"`max_tokens` and `max_requests` must be at least 1, got {self.max_tokens} and {self.max_requests}"
            )
        if self.spare_pages < 0:
            raise ValueError(f"`spare_pages` must be at least 0, got {self.spare_pages}")


class Room(NamedTuple):
    """What a cache has left.

    Attributes:
        page_size: tokens in a page.
        free_pages: pages that no request holds.
    """

    page_size: int
    free_pages: int

    @classmethod
    def of(cls, kv: PagedKV) -> Room:
        return cls(kv.page_size, kv.free_pages)

    def pages(self, tokens: int) -> int:
        """Pages that hold so many tokens of one request."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True)
class Step:
    """One step: who runs, and who joins and leaves before it.

    Attributes:
        ids: who takes part, in the order of the rows: decodes first.
        q_lens: new tokens of each.
        num_decodes: how many of them, the first ones, decode.
        preempted: who gives its pages back, newest first.
        admitted: who joins, in the order of the queue.
    """

    ids: tuple[Hashable, ...]
    q_lens: tuple[int, ...]
    num_decodes: int = 0
    preempted: tuple[Hashable, ...] = ()
    admitted: tuple[Hashable, ...] = ()

    @property
    def items(self) -> Iterator[tuple[Hashable, int]]:
        return zip(self.ids, self.q_lens, strict=True)

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    def build(self, kv: PagedKV) -> RaggedBatch:
        """The step as a batch over a cache, which finds room for its tokens; the preempted have been freed before."""
        return kv.batch(self.ids, self.q_lens)


@runtime_checkable
class Policy(Protocol):
    """What a step is made of."""

    def fill(self, draft: Draft) -> None:
        """Put decodes and chunks of prompts into a step."""


def compose(
    running: Sequence[Progress], waiting: Sequence[Progress], budget: Budget, policy: Policy, room: Room
) -> Step:
    """Choose the next step.

    Args:
        running: those that hold pages, oldest first.
        waiting: the queue, in its order; those with something computed get their pages back when they are admitted.
        budget: bounds of the step.
        policy: what it is made of.
        room: what the cache has left.

    Returns:
        A step of at most `budget.max_tokens`, empty only where nothing can run: no request, or all in flight. Where a
        policy finds nothing to do although there is something, the step is what fits.
    """
    draft = Draft(running, waiting, budget, room)
    policy.fill(draft)
    if draft.is_empty:
        draft.decode()
        if draft.is_empty:
            draft.prefill()
    return draft.step()


@dataclass(frozen=True)
class Composer:
    """A policy within a budget, as `plan.simulate` takes it, which lies below this package.

    Args:
        policy: what steps are made of.
        budget: bounds of each.
    """

    policy: Policy
    budget: Budget

    def begin(self, id: Hashable, tokens: int, limit: int) -> Progress:
        """A request of which nothing is computed."""
        return Progress(id, tokens, limit)

    def __call__(
        self, running: Sequence[Progress], waiting: Sequence[Progress], page_size: int, free_pages: int
    ) -> Step:
        """The next step, see `compose`."""
        return compose(running, waiting, self.budget, self.policy, Room(page_size, free_pages))


class Draft:
    """A step in the making.

    Attributes:
        decodes: running requests that miss one token, oldest first.
        prefills: running requests whose prompts are not computed to the end, oldest first.
        waiting: the queue.
        tokens_left: rows that the step still has room for.
        most_decodes: decodes that it may have; all by default.
    """

    def __init__(self, running: Sequence[Progress], waiting: Sequence[Progress], budget: Budget, room: Room) -> None:
        if room.page_size < 1 or room.free_pages < 0:
            raise ValueError(f"`room` must be of pages of at least 1 token, and none less than free, got {room}")
        self.running, self.waiting, self.room = list(running), waiting, room
        self.decodes: list[Progress] = []
        self.prefills: list[Progress] = []
        for each in running:
            missing = each.tokens - each.scheduled
            if missing == 1 and each.scheduled:
                self.decodes.append(each)
            elif missing:
                self.prefills.append(each)
        self.tokens_left, self._budget = budget.max_tokens, budget
        self.most_decodes = len(self.decodes)
        self._free = room.free_pages
        self._decoding: list[Progress] = []
        self._chunks: dict[Hashable, tuple[Progress, int]] = {}
        self._admitted: list[Hashable] = []
        self._preempted: list[Hashable] = []
        self._promised: int | None = None  # to those that run, and not held; worked out once somebody wants to join

    @property
    def is_empty(self) -> bool:
        return not self._decoding and not self._chunks

    @property
    def num_decoding(self) -> int:
        """Decodes that the step has so far."""
        return len(self._decoding)

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of prompts that the step has so far."""
        return sum(tokens for _, tokens in self._chunks.values())

    def decode(self) -> None:
        """Take every decode; where the step has no room for all, or must not, those that have waited longest.

        One that needs a page, and may take none from an older one, leaves its row to another.
        """
        size = self.room.page_size
        growing = sum([each.scheduled % size == 0 for each in self.decodes])
        crowded = len(self.decodes) > min(self.tokens_left, self.most_decodes)
        if not crowded and growing <= self._free:
            self._decoding = list(self.decodes)
            self._free -= growing
            self.tokens_left -= len(self.decodes)
            return
        for each in sorted(self.decodes, key=_served) if crowded else self.decodes:
            if self.tokens_left < 1 or len(self._decoding) >= self.most_decodes:
                break
            if each.id not in self._preempted and self._fit(each, 1):
                self._decoding.append(each)
                self._free -= each.scheduled % size == 0
                self.tokens_left -= 1
        taken = {each.id for each in self._decoding}
        self._decoding = [each for each in self.decodes if each.id in taken]

    def prefill(
        self,
        *,
        tokens: int | None = None,
        requests: int | None = None,
        whole: bool = False,
        admit: bool = True,
    ) -> None:
        """Take prompts: those that are begun, oldest first, then the queue's head as long as it may be admitted.

        Args:
            tokens: the most to take; all that the step has room for by default.
            requests: the most to take tokens of.
            whole: a prompt that does not fit as a whole waits, unless it is the first of the step.
            admit: whether to take from the queue.
        """
        left = self.tokens_left if tokens is None else min(tokens, self.tokens_left)
        most = len(self.prefills) + len(self.waiting) if requests is None else requests
        for each in self.prefills:
            if left < 1 or len(self._chunks) >= most:
                return
            if each.id in self._preempted:
                return
            taken = self._take_chunk(each, left, whole)
            if not taken:
                return
            left -= taken
        while admit and left > 0 and len(self._chunks) < most:
            taken = self._admit(left, whole)
            if not taken:
                return
            left -= taken

    def step(self) -> Step:
        """What has been taken."""
        chunks = list(self._chunks.values())
        return Step(
            (*[each.id for each in self._decoding], *[each.id for each, _ in chunks]),
            (1,) * len(self._decoding) + tuple([tokens for _, tokens in chunks]),
            len(self._decoding),
            tuple(self._preempted),
            tuple(self._admitted),
        )

    def _take_chunk(self, each: Progress, left: int, whole: bool) -> int:
        """Take of a prompt that is begun what may be taken; returns how many tokens."""
        missing = each.tokens - each.scheduled
        if whole and missing > left and self._chunks:
            return 0
        chunk = self._fit(each, min(missing, left))
        if chunk:
            self._grant(each, chunk, held=self.room.pages(each.scheduled))
        return chunk

    def _admit(self, left: int, whole: bool) -> int:
        """Admit the head of the queue with as much of its prompt as may be taken; returns how many tokens."""
        at = len(self._admitted)
        if at == len(self.waiting) or self._preempted or len(self.running) >= self._budget.max_requests:
            return 0
        each = self.waiting[at]
        missing = each.tokens - each.scheduled
        if (whole and missing > left and self._chunks) or not self._may_join(each):
            return 0
        chunk = min(missing, left, (self._free + each.shared) * self.room.page_size - each.scheduled)
        if chunk < 1:
            return 0
        self._admitted.append(each.id)
        self.running.append(each)
        self._grant(each, chunk, held=each.shared)
        return chunk

    def _grant(self, each: Progress, tokens: int, *, held: int) -> None:
        self._chunks[each.id] = (each, tokens)
        self._free -= self.room.pages(each.scheduled + tokens) - held
        self.tokens_left -= tokens

    def _may_join(self, each: Progress) -> bool:
        """Whether the cache holds what it, and all that run, have been promised."""
        if self._promised is None:
            # `_promise`, less the `pages` held, without a call for each
            size, most = self.room.page_size, attrgetter("limit" if self._budget.admission == "whole" else "tokens")
            ends = zip(map(most, self.running), self.running, strict=True)
            self._promised = sum([-(-end // size) + -each.scheduled // size for end, each in ends])
        spare = self._budget.spare_pages if self.running else 0
        need = self._promise(each) - each.shared
        if self._promised + need + spare > self.room.free_pages:
            return False
        self._promised += need
        return True

    def _promise(self, each: Progress) -> int:
        """Pages that a request may count on."""
        return self.room.pages(each.limit if self._budget.admission == "whole" else each.tokens)

    def _fit(self, each: Progress, tokens: int) -> int:
        """How many of so many tokens of a running request there is room for, once newer ones have made room for one."""
        while True:
            held = self.room.pages(each.scheduled)
            fits = (held + self._free) * self.room.page_size - each.scheduled
            if fits > 0:
                return min(tokens, fits)
            if not self._preempt_newer(each):
                return 0

    def _preempt_newer(self, each: Progress) -> bool:
        """Let the newest request give its pages back, unless it is this one, or is in flight.

        None that the step admits: it joins only where those that run have room for all their known tokens.
        """
        newest = self.running[-1]
        if newest is each or newest.computed != newest.scheduled:
            return False
        self.running.pop()
        taken = 0
        if newest.id in self._chunks:
            _, taken = self._chunks.pop(newest.id)
        elif newest in self._decoding:
            self._decoding.remove(newest)
            taken = 1
        self.tokens_left += taken
        self._free += self.room.pages(newest.scheduled + taken) - newest.shared
        self._preempted.append(newest.id)
        return True


def _served(each: Progress) -> int:
    return each.served


@dataclass(frozen=True)
class RequestLevel:
    """A batch is formed of the queue, as one step takes it, and runs until its last request is finished.

    What FasterTransformer does: late requests wait for the batch, finished ones leave their place empty.
    """

    def fill(self, draft: Draft) -> None:
        if draft.prefills or not draft.running:
            draft.prefill(admit=not draft.running)
        else:
            draft.decode()


@dataclass(frozen=True)
class PrefillFirst:
    """Prompts as soon as they come, whole and by themselves; decodes when there are none.

    Source: vLLM's first scheduler. Decodes stall as long as prompts arrive.
    """

    def fill(self, draft: Draft) -> None:
        draft.prefill(whole=True)
        if draft.is_empty:
            draft.decode()


@dataclass(frozen=True)
class FullHybrid:
    """All decodes, and whole prompts beside them.

    Source: Orca's iteration-level scheduling. A step lasts as long as its prompts. The first prompt of a step is cut
    where it does not fit, so that a long one cannot wait for ever.
    """

    def fill(self, draft: Draft) -> None:
        draft.decode()
        draft.prefill(whole=True)


@dataclass(frozen=True)
class DecodeMaximal:
    """One chunk of one prompt, and all decodes piggybacked on it.

    The chunk shrinks so that it ends on a tile together with the decodes: a product of one row more than a multiple of
    the tile takes as long as one of a whole tile more.

    Source: SARATHI (arXiv:2308.16369).

    Args:
        chunk: the most tokens of the prompt.
        tile: rows that products are computed in; 1 for no matter.

    Raises:
        ValueError: one of them is below 1.
    """

    chunk: int
    tile: int = 1

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.tile < 1:
            raise ValueError(f"`chunk` and `tile` must be at least 1, got {self.chunk} and {self.tile}")

    def fill(self, draft: Draft) -> None:
        draft.decode()
        rows = min(self.chunk, draft.tokens_left) + draft.num_decoding
        draft.prefill(tokens=tile_fit(rows, draft.num_decoding, self.tile) or self.chunk, requests=1)


@dataclass(frozen=True)
class StallFree:
    """All decodes, and of prompts what is left of a budget: no step lasts longer than its tokens take.

    Where there are more decodes than the budget, those run that have waited longest.

    Source: Sarathi-Serve (arXiv:2403.02310).

    Args:
        tau: rows of a step.
        tile: rows that products are computed in; prompts fill the step up to a multiple of it where one is in reach.

    Raises:
        ValueError: one of them is below 1.
    """

    tau: int
    tile: int = 1

    def __post_init__(self) -> None:
        if self.tau < 1 or self.tile < 1:
            raise ValueError(f"`tau` and `tile` must be at least 1, got {self.tau} and {self.tile}")

    def fill(self, draft: Draft) -> None:
        draft.tokens_left = min(self.tau, draft.tokens_left)
        draft.decode()
        rows = draft.tokens_left + draft.num_decoding
        draft.prefill(tokens=tile_fit(rows, draft.num_decoding, self.tile) or None)


@dataclass(frozen=True)
class Exclusive:
    """Prompts or decodes, in turn, where decodes are many; both in a step where they are few.

    On hardware whose bandwidth is the bound, a mixed step can cost more than its halves. Decodes that have waited a
    step go first, so none waits for two prompts in a row.

    Source: after "Threshold-Based Exclusive Batching" (arXiv:2606.00516); the turns are this library's.

    Args:
        threshold: share of a step's rows up to which decodes are mixed with prompts; 0 never mixes.

    Raises:
        ValueError: no share.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {self.threshold}")

    def fill(self, draft: Draft) -> None:
        if len(draft.decodes) <= self.threshold * draft.tokens_left:
            draft.decode()
            draft.prefill()
            return
        latest = max((each.served for each in draft.running), default=-1)
        if any(each.served < latest for each in draft.decodes):
            draft.decode()
        else:
            draft.prefill()
