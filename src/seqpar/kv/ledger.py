"""What has been appended so far, as host integers: one ledger for each layer.

A step promises a layer its tokens when the batch is made; a schedule may run the programs that append them in any order
that it holds to be causal. The ledger is what attention's promise is checked against: a few dictionary look-ups where a
schedule that is wrong would read memory that nobody has written.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from seqpar.partition import Range
from seqpar.ragged import RaggedBatch

__all__ = ["Ledger"]


class _Step(NamedTuple):
    """The requests of a batch that have new tokens, with their tokens before and after it."""

    requests: tuple[Hashable, ...]
    before: list[int]
    after: list[int]
    held: Mapping[Hashable, int]

    @classmethod
    def of(cls, batch: RaggedBatch) -> _Step:
        step: _Step | None = batch.plans.get("kv.ledger")
        if step is None:
            rows = zip(batch.requests, batch.q_lens, batch.kv_lens, strict=False)  # no names without a cache
            news = [(request, keys - new, keys) for request, new, keys in rows if new]
            after = {request: keys for request, _, keys in news}
            step = cls(tuple(after), [before for _, before, _ in news], list(after.values()), after)
            batch.plans["kv.ledger"] = step
        return step


class Ledger:
    """How many tokens of each request a layer holds, for every run of heads that has been appended by itself.

    Tokens count from the first on without a gap: what is appended beyond tokens that are missing does not count.
    """

    def __init__(self, num_heads: int) -> None:
        self._runs: list[tuple[Range, dict[Hashable, int]]] = [(Range(0, num_heads), {})]

    def add(self, batch: RaggedBatch, heads: Range | None = None) -> None:
        """The new tokens of `batch` have been appended, for all heads or for some."""
        step = _Step.of(batch)
        if heads is not None:
            self._cut(heads.start)
            self._cut(heads.stop)
        for lengths in self._of(heads):
            if list(map(lengths.get, step.requests)) == step.before:
                lengths.update(step.held)
                continue
            for request, before, after in zip(step.requests, step.before, step.after, strict=True):
                there = lengths.get(request, 0)
                if before <= there < after:
                    lengths[request] = after
        first = self._runs[0][1]
        if len(self._runs) > 1 and all(lengths == first for _, lengths in self._runs):
            self._runs = [(Range(0, self._runs[-1][0].stop), first)]

    def missing(self, batch: RaggedBatch, heads: Range | None = None) -> tuple[Hashable, int, int] | None:
        """A request of the batch some of whose keys are not there yet, its promised tokens and those appended."""
        step = _Step.of(batch)
        for lengths in self._of(heads):
            if list(map(lengths.get, step.requests)) != step.after:
                for request, promised in zip(step.requests, step.after, strict=True):
                    if lengths.get(request, 0) < promised:
                        return request, promised, lengths.get(request, 0)
        return None

    def appended(self, request: Hashable) -> int:
        """How many tokens of a request are there, of all heads."""
        return min(lengths.get(request, 0) for _, lengths in self._runs)

    def begin(self, request: Hashable, length: int) -> None:
        """The first `length` tokens of a new request are there."""
        for _, lengths in self._runs:
            lengths[request] = length

    def truncate(self, request: Hashable, length: int) -> None:
        """Count no more than `length` tokens of a request."""
        for _, lengths in self._runs:
            lengths[request] = min(length, lengths.get(request, 0))

    def free(self, request: Hashable) -> None:
        """Forget a request."""
        for _, lengths in self._runs:
            lengths.pop(request, None)

    def select(self, sources: Mapping[Hashable, Hashable]) -> None:
        """Let each key have what its value had, all at once."""
        for _, lengths in self._runs:
            lengths.update({new: lengths.get(old, 0) for new, old in sources.items()})

    def _of(self, heads: Range | None) -> Sequence[dict[Hashable, int]]:
        """What the runs that `heads` meets hold."""
        if heads is None:
            return [lengths for _, lengths in self._runs]
        return [lengths for run, lengths in self._runs if run.start < heads.stop and heads.start < run.stop]

    def _cut(self, at: int) -> None:
        """Let no run of heads lie across head `at`."""
        for i, (run, lengths) in enumerate(self._runs):
            if run.start < at < run.stop:
                self._runs[i : i + 1] = [(Range(run.start, at), lengths), (Range(at, run.stop), dict(lengths))]
                return
