"""Published numbers: each has a label, far misses have a reason, and the page says what is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seqpar.plan import HARDWARE
from tests.kernels.own_errors import own_errors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper_results

    return paper_results


@pytest.fixture
def written(paper: Any) -> list[Any]:
    content = json.loads((ROOT / "docs/results/paper-results.json").read_text())["rows"]
    return [paper.Row(**{name: value for name, value in row.items() if name != "status"}) for row in content]


def test_the_page_is_what_was_computed(paper: Any, written: list[Any]) -> None:
    assert paper.markdown(written) in (ROOT / "docs/paper-results.md").read_text()
    assert len({(row.paper, row.name) for row in written}) == len(written) > 150


def test_predictions_are_as_written(paper: Any, written: list[Any]) -> None:
    """Those that take a moment to compute again."""
    with own_errors():  # the checker takes ten times as long as the model
        again = [*paper.sarathi(), *paper.sarathi_serve(), *paper.context_parallel(), *paper.helix(), *paper.csps()]
    kept = {(row.paper, row.name): row for row in written}
    for row in again:
        assert kept[row.paper, row.name].published == row.published
        assert kept[row.paper, row.name].predicted == (
            row.predicted if row.predicted is None else pytest.approx(row.predicted)
        )


def test_a_pipeline_of_even_micro_batches_has_smaller_bubbles(paper: Any) -> None:
    with own_errors():
        found = paper.paper_pipeline.ratios(paper.paper_pipeline.predict(paper.ampere("a100"), 24))
    assert found["bubble_reduction"] > 2 and found["speedup"] > 1
    assert found["speedup"] == pytest.approx(found["speedup_over_tp"] * found["tp_over_pipeline_orca"])


def test_capacities_keep_their_bounds(paper: Any) -> None:
    """Lengths have the percentiles that are published; chunks serve more within the bound than whole prompts do."""
    capacity, table = paper.paper_capacity, paper.read("sarathi-serve")
    trace = table["traces"]["openchat_sharegpt4"]
    sizes = capacity.lengths((1730, 5696), (415, 834), 1 << 30, 4000)
    for at, (median, high) in enumerate((trace["prompt"], trace["output"])):
        drawn = sorted(each[at] for each in sizes)
        assert (drawn[2000], drawn[3600]) == pytest.approx((median, high), rel=0.06)
    assert max(map(sum, capacity.lengths((1730, 5696), (415, 834), 8192, 400))) <= 8192
    model = paper.Model.from_config(table["models"]["Mistral-7B"])
    server = capacity.Server(paper.Costs(model, paper.ampere("a100"), paper.Grid()), 0.1)
    with own_errors():
        chunks, whole = (capacity.capacity(server, name, trace, 25) for name in ("Sarathi", "vLLM"))
    assert chunks > 1.5 * whole


def test_misses_have_reasons_and_medians_hold(paper: Any, written: list[Any]) -> None:
    for row in written:
        if row.predicted is not None and row.status != "fitted" and row.off > paper.MISS:
            assert paper.why(row), (
                f"{row.paper}: {row.name} is {row.ratio:.2f} of what was published, and nothing says why"
            )
        if row.status == "fitted":
            assert row.predicted is not None
    labels = paper.read("labels")["papers"]
    for name, each in labels.items():
        for prefix in (*each["fitted"], *each["unknown"]):
            assert any(row.paper == name and row.name.startswith(prefix) for row in written), (name, prefix)


def test_a_preset_reaches_what_was_solved_for(paper: Any) -> None:
    device = HARDWARE["a6000"].accelerator
    solved = paper.sarathi_shares()
    for name in ("gemm_efficiency", "hbm_efficiency"):
        assert getattr(device, name) == pytest.approx(solved[name], abs=0.006)
    assert HARDWARE["h100"].accelerator.gemm_efficiency == paper.paper_overlap.FITTED["gemm_efficiency"]
    assert HARDWARE["h100"].accelerator.attention_efficiency == paper.paper_overlap.FITTED["attention_efficiency"]
    assert HARDWARE["h200"].accelerator.hbm_efficiency == pytest.approx(paper.paper_shift.solve().hbm_share, abs=6e-4)
