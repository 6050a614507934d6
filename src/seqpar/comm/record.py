"""What was sent, counted per collective and layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Count", "Recorder", "count", "record"]


class Count(NamedTuple):
    """Sums over the calls of one collective for one label, as seen by this rank.

    `num_bytes` is the volume that any bandwidth-optimal algorithm sends; `sent_bytes` is what the chosen one sent.
    """

    calls: int = 0
    num_bytes: int = 0
    sent_bytes: int = 0

    def plus(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Recorder:
    """Counts of one `record()` context; keys are (collective, label)."""

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    @property
    def total(self) -> Count:
        return sum_counts(self.counts.values())

    def by_op(self) -> dict[str, Count]:
        """Counts of each collective over all labels."""
        return {op: sum_counts(c for key, c in self.counts.items() if key[0] == op) for op, _ in self.counts}

    def by_label(self) -> dict[str, Count]:
        """Counts of each label over all collectives."""
        return {label: sum_counts(c for key, c in self.counts.items() if key[1] == label) for _, label in self.counts}

    def add(self, op: str, label: str, num_bytes: int, sent_bytes: int) -> None:
        """Count one call."""
        self.counts[op, label] = self.counts.get((op, label), Count()).plus(Count(1, num_bytes, sent_bytes))

    def table(self) -> str:
        """The counts for people: a line for each collective and label, then the total."""
        lines = [("collective", "label", "calls", "bytes", "sent")]
        for (op, label), c in [*sorted(self.counts.items()), (("total", ""), self.total)]:
            lines.append((op, label, f"{c.calls:,}", f"{c.num_bytes:,}", f"{c.sent_bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        form = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths, strict=True))
        return "\n".join(form.format(*line) for line in lines)


def sum_counts(counts: Iterable[Count]) -> Count:
    total = Count()
    for item in counts:
        total = total.plus(item)
    return total


_RECORDER: ContextVar[Recorder | None] = ContextVar("seqpar_recorder", default=None)


@contextmanager
def record() -> Iterator[Recorder]:
    """Count calls and bytes of every collective that this rank launches in the context.

    The innermost context counts. Collectives of a backward pass count where that pass runs in the same thread, as it
    does on a CPU. Groups of size 1 send nothing and count nothing.
    """
    recorder = Recorder()
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


def count(op: str, label: str, num_bytes: int, sent_bytes: int | None = None) -> None:
    """Count one call for the recorder in force, if there is one."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.add(op, label, num_bytes, num_bytes if sent_bytes is None else sent_bytes)
