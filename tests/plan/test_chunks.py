"""Chunks and budgets, by their formulas and by costs that are known."""

from __future__ import annotations

from typing import Any

import pytest

from seqpar.partition import Layout
from seqpar.plan import (
    Curve,
    StepCosts,
    balanced_chunk,
    kv_reread,
    most_requests,
    saturating_chunk,
    tbt_budget,
    tile_fit,
)
from tests.kernels.own_errors import own_errors

LAYOUT = Layout(1, 1)


def costs(*points: tuple[int, float]) -> StepCosts:
    return StepCosts({LAYOUT: Curve(tuple(n for n, _ in points), tuple(s for _, s in points))})


# SARATHI's times for products of a 13B layer on an A6000: 55, 69.8 and 92.33 ms at 128, 256 and 257 rows.
TILES = costs((1, 50e-3), (128, 55e-3), (129, 69e-3), (256, 69.8e-3), (257, 92.33e-3), (384, 93e-3), (512, 120e-3))


def test_a_budget_by_the_time_between_tokens() -> None:
    assert tbt_budget(TILES, 69.8e-3) == 256 == tbt_budget(TILES, 92e-3)
    assert tbt_budget(TILES, 1.0) == 512 and tbt_budget(TILES, 60e-3, tile=128) == 128
    line = costs((1, 1.001e-3), (1001, 2.001e-3))
    assert tbt_budget(line, 1.5005e-3) == 500 and tbt_budget(line, 1.5005e-3, tile=64) == 448
    dip = costs((1, 1e-3), (10, 5e-3), (20, 1e-3))
    assert tbt_budget(dip, 2e-3) == 3, "smaller steps must hold it too"
    with pytest.raises(ValueError, match=r"`seconds` must be at least a step's of 1 token\(s\) \(0.05 s\), got 0.001"):
        tbt_budget(TILES, 1e-3)


def test_the_smallest_chunk_that_runs_well() -> None:
    best = min(TILES.seconds(LAYOUT, n) / n for n in range(1, 513))
    for loss in (0.0, 0.1, 0.3):
        chunk = saturating_chunk(TILES, loss=loss)
        rates = [best * n / TILES.seconds(LAYOUT, n) for n in range(1, 513)]
        assert rates[chunk - 1] >= 1 - loss - 1e-12 and max(rates[: chunk - 1]) < 1 - loss
    assert saturating_chunk(TILES, loss=0.15, tile=128) == 256
    assert saturating_chunk(costs((1, 1.0), (8, 1.0)), tile=128, loss=0.0) == 8, "no tile was measured"


def test_prompts_carry_all_decodes_at_the_balance() -> None:
    """The paper's pairs: B = 4 with P:D = 42.7 and 85.3, B = 18 with about 15 and 30."""
    assert balanced_chunk(128 / 3, 4, high=512) == 128 and balanced_chunk(256 / 3, 4, high=512) == 256
    assert balanced_chunk(256 / 17, 18, high=512, tile=128) == 256
    assert balanced_chunk(512 / 17, 18, high=512, tile=128) == 512
    assert balanced_chunk(1.0, 4, low=256, high=512) == 256 and balanced_chunk(float("inf"), 4, high=512) == 512
    assert balanced_chunk(1.0, 101, high=100, tile=64) == 64, "the next tile is beyond the largest chunk"
    assert balanced_chunk(1.0, 91, low=70, high=100, tile=64) == 90, "no tile within the bounds"


def test_reads_rows_and_requests() -> None:
    assert kv_reread(8192, 512) == 8.5 and kv_reread(10, 4) == (4 + 8 + 10) / 10 and kv_reread(3, 8) == 1.0
    assert [tile_fit(rows, 5, 8) for rows in (4, 8, 15, 16)] == [0, 3, 3, 11]
    assert most_requests(100, 40, 2, 7) == 4 and most_requests(10, 40, 2, 7) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tile_fit(0, 1, 1), "`rows` must be at least 1, got 0"),
        (lambda: balanced_chunk(1.0, 0, high=3), "`most_requests` must be at least 1, got 0"),
        (lambda: balanced_chunk(1.0, 2, low=4, high=3), "`low` must be at most `high`"),
        (lambda: balanced_chunk(0.0, 2, high=3), "`prompt_to_decode` positive, got 1, 3 and 0.0"),
        (lambda: saturating_chunk(TILES, loss=1.0), r"`loss` must be in \[0, 1\), got 1.0"),
        (lambda: tbt_budget(TILES, 1.0, tile=0), "`tile` must be at least 1, got 0"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=message):
        call()
