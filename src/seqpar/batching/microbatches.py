"""Steps in flight in a pipeline: what may be composed while others are under way, as host integers.

A step is scheduled when it enters the first stage and computed when its tokens are back. In between, the requests'
`Progress` says so: a chunk of a prompt follows the one before in the next micro-batch, since a stage of it needs only
that stage's keys of the one before; a decode does not, since its token is not known. So a request's chunks run back to
back, and at most one decode of it is in flight, without a word about pipelines in any policy.

Nothing here knows a tensor or a rank: equal calls give equal queues on every rank of every stage.

Sources: SARATHI (arXiv:2308.16369) for uniform micro-batches, Sarathi-Serve (arXiv:2403.02310) for a queue as deep as
the pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from seqpar.batching.compose import Draft, Policy, Step
from seqpar.batching.requests import Progress

__all__ = ["MicroBatchQueue", "Spread"]


class MicroBatchQueue:
    """The steps in flight, oldest first: at most `depth`.

    Args:
        depth: as many as the pipeline has stages keep all of them busy where micro-batches take alike; one more lets
            activations travel while others are computed.

    Attributes:
        pushed: steps so far.

    Raises:
        ValueError: a depth below 1.
    """

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}")
        self.depth, self.pushed = depth, 0
        self._flying: deque[tuple[Step, tuple[Progress, ...]]] = deque()

    @property
    def is_ready(self) -> bool:
        """Whether another step may enter."""
        return len(self._flying) < self.depth

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is in flight, oldest first."""
        return tuple(step for step, _ in self._flying)

    @property
    def ids(self) -> frozenset[Hashable]:
        """The requests of which something is in flight."""
        return frozenset(request for step, _ in self._flying for request in step.ids)

    def push(self, step: Step, progress: Mapping[Hashable, Progress]) -> None:
        """Let a step enter; its tokens count as scheduled from now on.

        Args:
            step: as `compose` made it.
            progress: of the requests in it, and of others.

        Raises:
            ValueError: the queue is full, or the step has tokens that are not known yet: a second decode in flight.
                Then nothing has changed.
        """
        if not self.is_ready:
            raise ValueError(f"a queue must have room for a step (depth {self.depth}), got a full one; complete one")
        parts = tuple(progress[request] for request in step.ids)
        for each, new in zip(parts, step.q_lens, strict=True):
            if each.scheduled + new > each.tokens:
                raise ValueError(
                    f"a step must have known tokens of each request (request {each.id!r} has "
                    f"{each.tokens - each.scheduled} left), got {new}; wait for the one in flight"
                )
        self.pushed += 1
        for each, new in zip(parts, step.q_lens, strict=True):
            each.scheduled += new
            each.served = self.pushed
        self._flying.append((step, parts))

    def complete(self) -> Step:
        """Let the oldest step leave; its tokens count as computed from now on.

        Raises:
            ValueError: nothing is in flight.
        """
        if not self._flying:
            raise ValueError("a step must be in flight to be completed, got an empty queue")
        step, parts = self._flying.popleft()
        for each, new in zip(parts, step.q_lens, strict=True):
            each.computed += new
        return step


@dataclass(frozen=True)
class Spread:
    """The steps of another policy, each with its share of the decodes, so that all micro-batches in flight have some.

    A policy that takes every decode that is ready would have all of them in one micro-batch, for ever, and the stages
    work by turns. Those that have waited longest go first.

    Args:
        policy: what a step is made of.
        ways: micro-batches that share the decodes.

    Raises:
        ValueError: no way.
    """

    policy: Policy
    ways: int

    def __post_init__(self) -> None:
        if self.ways < 1:
            raise ValueError(f"`ways` must be at least 1, got {self.ways}")

    def fill(self, draft: Draft) -> None:
        decoding = sum(1 for each in draft.running if each.scheduled and each.tokens - each.scheduled <= 1)
        draft.most_decodes = -(-decoding // self.ways)
        self.policy.fill(draft)
