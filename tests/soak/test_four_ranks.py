"""A thousand steps on four ranks in which everything changes all the time, at random.

Requests join, end, are cancelled, run out of pages and give way, while the layout of a step, whether its chunks take
turns, and where pages lie change between the steps, and steps fail before the model or behind it. After every step the
loop and its cache are checked by `tests.batching.session`. Every request generates what it generates alone, in
Transformers' own model; no page and no handle is left, and no rank's memory grows.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from seqpar import comm
from seqpar.batching import Step
from seqpar.partition import Interleave, Layout, Shift
from tests.batching.session import Session, case_on, counts, drawn
from tests.batching.test_master import crowded
from tests.ranks import run_mesh

LAYOUT = Layout(2, 2)
PAUSE = 25
"""Steps after which all that is live is let end, and what is left over is counted."""

MOST_GROWTH = 8 << 20
"""Bytes by which a rank may be larger at the end than early on: steps hold none, allocators some."""


class Changing(Session):
    """A session whose model runs each step as it was last told to."""

    def __init__(self, *args: Any, backbone: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.backbone = backbone
        self.changes = self.shifted = self.overlapped = self.moved = 0

    def change(self, tau: int, min_tokens: int) -> None:
        """Up to `tau` tokens a step is tensor-parallel, from `min_tokens` on it is cut in two; 0 for never."""
        self.changes += 1
        self.backbone.shift = Shift.threshold(tau, LAYOUT) if tau else None
        self.backbone.overlap = Interleave(2, min_tokens=min_tokens) if min_tokens else None

    def compact(self, strategy: Any) -> None:
        self.moved += len(self.loop.kv.compact(strategy).moves)
        self.check()

    def check_plan(self, plan: Step, decodes: set[Any]) -> None:
        super().check_plan(plan, decodes)
        shift, overlap = self.backbone.shift, self.backbone.overlap
        self.shifted += shift is not None and shift.layout_of(plan.num_tokens) != LAYOUT
        self.overlapped += overlap is not None and plan.num_tokens >= overlap.min_tokens and max(plan.q_lens) > 1


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soaks(mesh: comm.DeviceMesh, preemption: str, steps: int) -> tuple[dict[str, int], str, list[int]]:
    """What was seen, a digest of every step and every token, and this rank's bytes at each pause."""
    draw, case = random.Random(steps), case_on(mesh, "tiny", {"shift": 3})
    setup = crowded(preemption=preemption, compaction="window" if preemption == "swap" else "none")
    first = comm.groups(mesh).flat.rank() == 0
    session = Changing(setup, case, backbone=case.model.model, compares=first)  # type: ignore[attr-defined]
    digest, sizes, pause = hashlib.sha256(), list[int](), PAUSE
    there: tuple[int, int] | None = None
    while session.loop.steps < steps:
        session.act(action(draw, len(session.live)))
        if session.loop.steps < pause:
            continue
        pause = session.loop.steps + PAUSE
        session.finish()
        digest.update(repr(session.model.log).encode())
        session.model.log.clear()
        gc.collect()
        assert not session.ended, "requests that have ended are kept by nobody"
        assert not [each for each in gc.get_objects() if issubclass(type(each), comm.Handle)], "handles"
        now = threading.active_count(), len(os.listdir("/proc/self/fd"))
        assert there is None or now == there, "threads and open files"
        there = now
        sizes.append(resident())
    found = {name: getattr(session, name) for name in ("changes", "shifted", "overlapped", "moved")}
    return counts(session) | found, digest.hexdigest(), sizes


def action(draw: random.Random, live: int) -> tuple[Any, ...]:
    kind = draw.random()
    if kind < 0.10:
        return "change", draw.choice([0, 0, 2, 4, 9]), draw.choice([0, 0, 2, 4])
    if kind < 0.13:
        return "compact", draw.choice(["tail", "window", "stable"])
    return drawn(draw, live)


def assert_flat(sizes: Sequence[int]) -> None:
    """The last quarter is as large as the second: in the first one everything is used for the first time."""
    quarter = len(sizes) // 4
    growth = statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter])
    assert growth <= MOST_GROWTH, f"{growth / 2**20:.1f} MiB more, of {[size >> 20 for size in sizes]}"


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("steps", [pytest.param(1000, marks=pytest.mark.slow)])
def test_a_thousand_steps(steps: int, preemption: str) -> None:
    told = run_mesh(LAYOUT, soaks, preemption, steps, timeout_s=1200.0)
    found, digest, _ = told[0]
    print(preemption, found, *(f"{sizes[0] >> 20} to {sizes[-1] >> 20} MiB" for *_, sizes in told))
    assert found["steps"] >= steps and found["served"] > steps // 10
    seen = ("cancelled", "preempted", "failed", "changes", "shifted", "overlapped", "moved")
    assert all(found[each] > 10 for each in seen)
    for theirs, same, sizes in told:
        assert (theirs, same) == (found, digest)
        assert_flat(sizes)


def test_growth_is_seen() -> None:
    assert_flat([600 << 20] * 4 + [640 << 20] * 12)
    with pytest.raises(AssertionError, match="MiB more"):
        assert_flat([(600 << 20) + (2 << 20) * step for step in range(16)])
