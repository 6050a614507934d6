"""What the benchmarks share: the statistics, the report, and that a wrong result prints no numbers."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    return common


def test_a_ratio_is_paired(common) -> None:
    """A machine that slows down by turns hides a tenth from unpaired medians, not from paired ratios."""
    load = [1.0, 7.0, 2.0, 9.0, 3.0, 1.0, 5.0] * 3
    ours = common.Timing("ours", tuple(0.9 * x for x in load))
    theirs = common.Timing("theirs", tuple(load))
    found = common.ratio(ours, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def test_an_interval_holds_the_median_and_widens_with_noise(common) -> None:
    theirs = common.Timing("theirs", (1.0,) * 9)
    calm = common.ratio(common.Timing("ours", tuple(0.5 + 0.001 * i for i in range(9))), theirs)
    wild = common.ratio(common.Timing("ours", tuple(0.5 + 0.1 * i for i in range(9))), theirs)
    for found in (calm, wild):
        assert found.low <= found.value <= found.high
    assert calm.high - calm.low < wild.high - wild.low


def test_report(common, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        common.Row("a: ÷ peer", 0.4, "x", 0.5, True, (0.3, 0.45)),
        common.Row("b: ÷ peer", 0.6, "x", 0.5, False, (0.55, 0.7)),
        common.Row("a: ours", 12.5, "ms"),
    ]
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n<!-- begin of the generated table -->\nold\n<!-- end of the generated table -->\nReading.\n"
    )
    args = argparse.Namespace(json=tmp_path / "out.json", plot=tmp_path / "out.png", markdown=page)
    common.report(args, common.meta("a machine", ["torch", "no-such-package"]), rows, "title")

    printed = capsys.readouterr().out
    assert "target 0.5 met" in printed and "target 0.5 MISSED" in printed
    written = json.loads(args.json.read_text())
    assert [set(row) >= {"name", "value", "unit", "target", "ok"} for row in written["rows"]] == [True] * 3
    assert written["meta"]["versions"]["no-such-package"] is None
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("Reading.\n") and "old" not in text
    assert "| b: ÷ peer | 0.6 x | 0.55 to 0.70 | 0.5 | **missed** |" in text
    assert args.plot.stat().st_size > 1000


def test_the_bound_of_a_pipeline_by_hand(common) -> None:
    """Two groups by two chunks: 3 + 3 s in and 1 s back for each; attention of 8 s, chunks seeing 3 to 5 of 8 keys."""
    import phases

    case = phases.Case(tokens=1024, share=0.5, head_groups=2, query_chunks=2, rounds=2)
    serial, ideal = common.Timing("serial", (18.0, 18.0)), common.Timing("pipelined", (12.0, 12.0))
    result = phases.Result(serial, ideal, 10.0, [0.5, 1.0, 0.5, 1.0] * 2, [1.0] * 4, 0.0)
    assert phases.bound_s(case, result, 8.0) == 2.0 + 8.0 + 1.0
    assert phases.bound_s(case, result, 1.0) == 6.0 + 4.0  # all that travels
    late = result._replace(ways_back=[0.1, 0.1, 0.1, 3.0])
    assert phases.bound_s(case, late, 2.0) == pytest.approx(6.0 + 2.0 * 0.625 / 2 + 3.0)  # seen: 384 and 640 of 1024
    found = phases.efficiency(case, result)
    assert (found.of_all, found.of_bound, found.interval) == (6 / 8, 6 / 7, (6 / 7, 6 / 7))


@pytest.fixture
def overlap(common, monkeypatch: pytest.MonkeyPatch):
    import overlap

    return overlap


@pytest.mark.parametrize("share", [0.15, 0.5, 0.65])
def test_a_link_makes_communication_the_share_asked_for(overlap, share: float) -> None:
    serial = [[overlap.Segment(0.3, 4096), overlap.Segment(0.5, 8192), overlap.Segment(0.2, None)]]
    link = overlap.link_for(serial, share)
    replayed = overlap.replay(serial, link)
    assert replayed == pytest.approx(1.0 / (1 - share))
    assert sum(slot.comm_s for slot in overlap.slots(serial, link)[0]) == pytest.approx(share * replayed)


def test_efficiency_and_regret_are_of_the_replayed_segments(overlap) -> None:
    outcome = overlap.Outcome(
        1024, 0.5, (512,), "", 2.0, 1.0, 1.0, {"n=1": 2.0, "n=2": 1.05, "n=4": 1.0, "auto": 1.05}, 1.05, {}, 0.0
    )
    rows = {row.name.split(": ")[1]: row for row in overlap.rows_of([outcome], {"1gbit": "no such namespace"})}
    assert rows["efficiency, replay"].value == pytest.approx(0.95) and rows["efficiency, replay"].ok
    assert rows["regret of auto"].value == pytest.approx(0.05) and not rows["regret of auto"].ok
    assert rows["chunks chosen"].value == 2


@pytest.mark.slow
def test_a_wrong_result_prints_no_numbers(tmp_path: Path) -> None:
    """The benchmark itself, with a contender that forgets the residual."""
    script = tmp_path / "layers.py"
    right = (BENCHMARKS / "layers.py").read_text()
    wrong = right.replace("lambda: layer(inputs.x, ", "lambda: -inputs.x + layer(inputs.x, ")
    assert wrong != right
    script.write_text(wrong)
    (tmp_path / "common.py").write_text((BENCHMARKS / "common.py").read_text())
    ran = subprocess.run(
        [sys.executable, script, "--quick", "--only", "decode 1"], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 1
    assert "WRONG RESULT" in ran.stderr and "decode 1 seqpar: relative error" in ran.stderr
    assert "ms" not in ran.stdout


def overlap_on_a_cpu(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, "--device", "cpu", "--quick", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_overlap_cuda_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    ran = overlap_on_a_cpu(BENCHMARKS / "overlap_cuda.py", "--json", found)
    assert ran.returncode == 0, ran.stderr
    written = json.loads(found.read_text())
    assert written["meta"]["simulated"] is True
    assert {row["name"].split(":")[0] for row in written["rows"]} == {"ghost", "tax", "contention", "late", "schedules"}
    assert "simulated sums, graphs, ms; beside TokenWeave's" in ran.stdout


def test_overlap_cuda_prints_nothing_over_chunks_that_differ(tmp_path: Path) -> None:
    script = tmp_path / "overlap_cuda.py"
    right = (BENCHMARKS / "overlap_cuda.py").read_text()
    wrong = right.replace("return torch.cat(comm.interleave(", "return 2 * torch.cat(comm.interleave(")
    assert wrong != right
    script.write_text(wrong)
    (tmp_path / "common.py").write_text((BENCHMARKS / "common.py").read_text())
    ran = overlap_on_a_cpu(script, "--only", "schedules")
    assert ran.returncode == 1 and not ran.stdout
    assert "WRONG RESULT: schedules: 32 tokens in 2 chunks: interleaved differs" in ran.stderr


@pytest.mark.slow
def test_a_wire_format_above_its_bound_prints_no_numbers(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks" / "wire.py"
    script.parent.mkdir()
    right = (BENCHMARKS / "wire.py").read_text()
    wrong = right.replace('"int8": 1 / 239', '"int8": 1 / 23900')
    assert wrong != right
    script.write_text(wrong)
    (script.parent / "common.py").write_text((BENCHMARKS / "common.py").read_text())
    (tmp_path / "examples").symlink_to(BENCHMARKS.parent / "examples")
    ran = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert "WRONG RESULT" in ran.stderr and "int8 on 2 ranks: error above the stated bound" in ran.stderr
    assert "bytes" not in ran.stdout


@pytest.fixture
def shift(common, monkeypatch: pytest.MonkeyPatch):
    import shift

    return shift


def test_traffic_is_served_by_hand(shift) -> None:
    """Four tokens a step: 4 of A; the other 2 of A and 2 of B, both first tokens; the second one of A."""
    import traffic

    requests = [traffic.Request(0.0, 6, 2), traffic.Request(0.5, 2, 1)]
    found = traffic.serve(requests, lambda tokens: 1.0, budget=4)
    assert found.steps == (4, 4, 1)
    assert (found.ttft_s, found.tpot_s, found.tokens_per_s) == ((2.0 + 1.5) / 2, 1.0, 11 / 3)
    late = traffic.serve([traffic.Request(3.0, 6, 2), traffic.Request(9.0, 2, 1)], float, budget=4)
    assert late.steps == (4, 2, 3) and late.ttft_s == (6.0 + 3.0) / 2  # a step takes a second a token


def test_bursts_are_the_same_for_a_seed_and_come_in_phases(shift) -> None:
    import traffic

    requests = traffic.bursty(80, 1e4, phase=40)
    assert requests == traffic.bursty(80, 1e4, phase=40) != traffic.bursty(80, 1e4, phase=40, seed=1)
    quiet, burst = requests[39].arrival_s, requests[79].arrival_s - requests[39].arrival_s
    assert quiet > 5 * burst


def test_auto_is_judged_by_what_it_has_not_seen(shift) -> None:
    """Even repetitions say that tensor parallelism is the faster one, odd ones that it is not: all of it is regret."""
    from seqpar.partition import Layout

    sizes = (1, 8, 64)
    steps = {
        Layout(2, 1): {n: shift.Step([], [], [1.0 * n, 3.0 * n] * 2) for n in sizes},
        Layout(1, 2): {n: shift.Step([], [], [2.0 * n, 2.0 * n] * 2) for n in sizes},
    }
    verdict = shift.judge("made up", steps, sizes, None, 20)
    assert [verdict.regret(n) for n in sizes] == [0.5] * 3
    rows = {row.name: row for row in shift.rows_of([verdict])}
    assert not rows["made up, 8 token(s): regret of auto (2x1)"].ok
    assert not rows["made up, trace, tpot: regret of auto"].ok
    assert rows["made up, trace, tpot: regret of auto"].value == pytest.approx(0.5)
    assert rows["made up, trace, tokens/s: regret of auto"].value > 0


def test_layouts_are_compared_within_rounds_and_refined_between_unlike_ends(shift) -> None:
    """The machine gets slower from round to round, by the same for both; they cross between 8 and 16 tokens."""
    from seqpar.partition import Layout

    rounds = (1.0, 1.0, 7.0, 7.0, 3.0, 3.0)  # seen are the first, third and fifth
    times = {1: (2.0, 4.0), 8: (2.0, 4.0), 12: (2.0, 3.0), 14: (4.0, 3.0), 16: (4.0, 3.0)}
    steps = {
        layout: {n: shift.Step([], [], [slow * pair[at] for slow in rounds]) for n, pair in times.items()}
        for at, layout in enumerate((Layout(2, 1), Layout(1, 2)))
    }
    assert shift.seconds_of(steps, 12, shift.SEEN, None) == pytest.approx({Layout(2, 1): 6.0, Layout(1, 2): 9.0})
    assert shift.refined(steps, (1, 8, 16), None, 1) == (1, 8, 12, 16)
    assert shift.refined(steps, (1, 8, 16), None, 2) == (1, 8, 12, 14, 16)


def test_a_replayed_step_waits_for_its_link(shift) -> None:
    """Slots of 1, 2 and 3 s, sums of 100 and 200 bytes at 100 bytes a second: 6 + 3 s; medians are of each slot."""
    from seqpar.comm import SimulatedLink

    step = shift.Step([[1.0, 2.0, 3.0], [1.0, 9.0, 3.0], [1.0, 2.0, 0.0]], [100, 200], [])
    assert step.seconds(slice(None), SimulatedLink(0.0, 100.0)) == pytest.approx(9.0)


@pytest.fixture
def csa(common, monkeypatch: pytest.MonkeyPatch):
    import csa

    return csa


def test_the_dense_exchange_by_hand(csa) -> None:
    """Two tokens a rank: six, four, two and none travel, K and V of 2 heads of 3 in 2 bytes; then 2, 1, 1, 1 tokens."""
    assert csa.dense_bytes(8, kv_heads=2, head_dim=3) == (6 + 4 + 2) * 2 * 2 * 3 * 2
    assert csa.dense_bytes(5, kv_heads=1, head_dim=1) == (6 + 2 + 1) * 2 * 2


def test_a_reading_is_judged_by_hand(csa) -> None:
    """Six tokens, the ones at 3 and 5 asked for, 2 and 3 no source; the last token has nothing to say."""
    import torch
    from reading import Read, Text

    ids = torch.tensor([0, 1, 2, 3, 1, 2])
    source = torch.tensor([True, True, False, False, True, True])
    text = Text(ids, torch.tensor([0, 0, 0, 8, 0, 32]), (8, 16, 32), source, ids[:0], ids[:0])
    said = torch.tensor([1, 0, 3, 1, 0, 0])  # wrong about 2 and about 5, that is at 1 and 4
    logits = torch.full((6, 4), 0.0).scatter_(1, said[:, None], math.log(3))  # 1/2, else 1/6
    dense = Read(torch.arange(6), torch.zeros(6, 4), [])
    found = csa.judge(Read(torch.arange(6), logits, []), dense, text)
    kl, loss, count, same, *retrieval = found.tolist()
    two, four, six = map(math.log, (2, 4, 6))
    assert kl == pytest.approx(5 * (two / 4 + 3 * six / 4 - four))
    assert (loss, count) == (pytest.approx(2 * two + six), 3)  # source: 1 and 4, said; 5, not said
    assert same == 2  # of all equal logits the first is the likeliest: token 0, at 1 and 4
    assert retrieval == [1, 0, 0, 1, 0, 1]
    assert csa.judge(dense, dense, text)[0] == 0


def test_tokens_of_retrieval_lines_are_no_source(csa) -> None:
    import torch
    from reading import lines_from

    ids = torch.tensor([5, 8, 1, 1, 1, 5, 5, 9, 1, 1])
    assert lines_from(ids, (8, 9)).tolist() == [0, 1, 1, 1, 1, 0, 0, 1, 1, 1]


def test_targets_of_sparse_attention(csa) -> None:
    """Bytes of 0.4, 0.5 and 0.9 on three heads miss the median of 0.45; one query is worse than it was promised."""
    certified = csa.Method("Certified(0.03)", "Certified", object(), 0.03)
    masses = [csa.Method(f"TopMass({c})", "TopMass", object()) for c in (0.5, 0.9)]
    chosen = [csa.Method("dense", "dense", None), *masses, certified]

    def case(ratio: float, broken: int) -> object:
        return csa.Case(4096, 0, 0, 0, certified.name, ratio, 0.02, 0.01, 0.001, 0.01, 0.029, broken, 3)

    def reading(method: str, ratio: float, hits: int) -> object:
        return csa.Reading(4096, method, 8192, 1.0, ratio, 0.0, 1.0, 1.0, {32: (hits, 100), 64: (100, 100)}, (1, 2))

    readings = [reading("dense", 1.0, 100), reading("TopMass(0.5)", 0.2, 97), reading("TopMass(0.9)", 0.3, 100)]
    summaries = [csa.summary_of([case(1.0, 0)._replace(method=r.method, certificate=None)], r) for r in readings]
    cases = [case(ratio, broken) for ratio, broken in ((0.4, 0), (0.9, 1), (0.5, 0))]
    summaries.append(csa.summary_of(cases, reading(certified.name, 0.6, 100)))
    rows = {row.name.removeprefix("4096 tokens, "): row for row in csa.rows_of(summaries, chosen)}
    median = rows["Certified(0.03): bytes ÷ dense, median of layers and heads"]
    assert (median.value, median.target, median.ok) == (0.5, 0.45, False)
    assert rows["Certified(0.03): the same, 90th percentile"].value == pytest.approx(0.82)
    assert not rows["Certified(0.03): queries with an error above their certificate"].ok
    assert rows["Certified(0.03): largest certificate ÷ max |v|"].ok
    mass = rows["TopMass(0.5) at 20 % of the bytes: retrieval lost"]  # the other one sends too much
    assert (mass.value, mass.ok) == (pytest.approx(1.5), False)


def test_measurements_are_stored_and_joined(csa, tmp_path: Path) -> None:
    """A run of another method joins in the order of the methods; what was measured again replaces what was."""
    chosen = [csa.Method(name, name, None) for name in ("dense", "a", "b")]

    def run(*names: str, error: float = 0.5) -> object:
        cases = [csa.Case(8, 0, 1, 0, name, 0.5, error, 0.1, 0.1, math.nan, None, 0, 1) for name in names]
        readings = [csa.Reading(8, name, 8, 2.0, 0.5, 0.1, 2.0, 1.0, {32: (3, 4)}, (1, 2)) for name in names]
        return csa.Found(cases, [csa.Sharpness(8, 0, 1, 0, 3.0, 0.5, 0.9, 7.0)], readings, cases)

    file = tmp_path / "run.json"
    csa.store(file, csa.storable(run("dense", "b", "forgotten")))
    back = csa.stored(file)
    assert math.isnan(back.cases[0].relative) and back.cases[0].certificate is None
    assert back.readings == run("dense", "b", "forgotten").readings
    found = csa.joined([back, run("a", "b", error=0.25)], chosen)
    assert [(case.method, case.worst) for case in found.cases] == [("dense", 0.5), ("a", 0.25), ("b", 0.25)]
    assert [entry.method for entry in found.readings] == ["dense", "a", "b"] and len(found.sharpness) == 1


def sparse(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_sparse_attention_is_measured_whole(tmp_path: Path) -> None:
    ran = sparse(BENCHMARKS / "csa.py")
    assert ran.returncode == 0, ran.stderr
    assert "### 512 tokens" in ran.stdout and "| dense | 1.000 | 1.000 | 1.000 |" in ran.stdout


@pytest.mark.slow
def test_sparse_attention_prints_nothing_over_a_wrong_exchange(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks" / "csa.py"
    script.parent.mkdir()
    right = (BENCHMARKS / "csa.py").read_text()
    wrong = right.replace("* kv_heads * head_dim * 2 * 2", "* kv_heads * head_dim * 2")
    assert wrong != right
    script.write_text(wrong)
    for name in ("common.py", "reading.py"):
        (script.parent / name).write_text((BENCHMARKS / name).read_text())
    (tmp_path / "examples").symlink_to(BENCHMARKS.parent / "examples")
    ran = sparse(script)
    assert ran.returncode == 1 and not ran.stdout
    assert "WRONG RESULT" in ran.stderr and "bytes, the dense exchange is" in ran.stderr


@pytest.fixture
def paper_long(common, monkeypatch: pytest.MonkeyPatch):
    import paper_long

    return paper_long


def test_rings_cross_where_they_were_published_to(paper_long) -> None:
    """Every row that has a faster one is chosen right; the crossings by the thresholds themselves, worked out here."""
    rates = paper_long.solve()
    found = paper_long.report(rates)
    for row in found["rings"]:
        if row["better"] is not None:
            assert row["chosen"] == {"at_end": row["better"], "in_hops": row["better"]}
            assert row["rules"]["meta-1"] == row["better"]
    assert found["rings"][1]["predicted"]["kv_hop_us"] == pytest.approx(627)  # what was solved for
    assert found["rings"][1]["predicted"]["attention_us"] == pytest.approx(414)
    crossings = found["crossover"]
    assert crossings["meta-1, peak rates"] == 4000  # hidden from there on, however many tokens are cached
    assert crossings["meta-5, peak rates"] == 3200  # 2.5 %, the paper's row
    assert crossings["meta-fit, peak rates"] is None
    at_end = crossings["answers at the end"]
    assert crossings["meta-5, solved rates"] - at_end == pytest.approx(0, abs=100)  # scanned in hundreds
    assert at_end < crossings["answers in hops"] < crossings["measured"]


def test_whole_prompts_decodes_and_helix_are_predicted(paper_long) -> None:
    found = paper_long.report(paper_long.solve())
    assert [row["off"] for row in found["prefill"]] == pytest.approx([-0.09, -0.30, 0.0], abs=0.01)
    assert found["decode"][0]["predicted_us"] == pytest.approx(38.9)
    assert found["decode"][2]["predicted_us"] == pytest.approx(13.55)
    assert (found["helix"]["serial"], found["helix"]["overlapped"]) == pytest.approx((25.6, 17.2))
    assert found["helix"]["bytes"]["8 x 8"] == 7 * 2 * (128 * 2 + 4)


def test_long_contexts_write_their_tables(paper_long, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{paper_long.BEGIN}\nold\n{paper_long.END}\nafter\n")
    paper_long.main(["--quick", "--json", str(tmp_path / "x.json"), "--markdown", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 3,200 | 2.5% | 627, solved | 166, 125 (-24%) |" in text and text.split(paper_long.BEGIN)[1][1:] in (
        capsys.readouterr().out + f"{paper_long.END}\nafter\n"
    )
    assert json.loads((tmp_path / "x.json").read_text())["crossover"]["measured"] == 6400
    kept = (BENCHMARKS.parent / "docs/results/paper-long.md").read_text()
    assert text.split(paper_long.BEGIN)[1].split(paper_long.END)[0] in kept


@pytest.fixture
def decode(common, monkeypatch: pytest.MonkeyPatch):
    import decode

    return decode


def made_up_decodes(decode, slope: float, noise: float = 0.0):
    """Seconds of compute alone: 1 and `slope` of each thousand tokens by heads, 3 and a half of that if spread.

    The odd repetitions take `noise` longer by heads.
    """
    found = {}
    for batch in decode.BATCHES:
        for context in (decode.SHORT, *(n for n in decode.QUICK_CONTEXTS if n * batch <= decode.MOST)):
            read = slope * batch * context / 1000
            for form in decode.FORMS:
                local = form == "local"
                seconds = 1.0 + read if local else 3.0 + read / 2
                slots = 1 if local else 2 if form == "helix" else 4 if form == "ag_rs" else 3
                runs = [[seconds + noise * local * (turn % 2)] + [0.0] * (slots - 1) for turn in range(4)]
                found[decode.Key(form, batch, context)] = decode.Step(runs, [100] * (slots - 1), [])
    return found


def test_decodes_cross_where_reading_saves_what_exchanges_take(decode) -> None:
    """2 s and two exchanges of half a second or none: 3 s or 2 of half the reading."""
    case = decode.Case(2, 1)
    for alpha_s, tokens in ((0.0, 4000), (0.5, 6000)):
        link = decode.LinkCosts(alpha_s, 1e12)
        verdict = decode.judge(case, "made up", made_up_decodes(decode, 1.0), decode.QUICK_KNOWN, link)
        assert verdict.costs.crossover(1) == pytest.approx(tokens, rel=0.01)
        assert verdict.crossover(1) == pytest.approx(tokens, rel=0.01)
        assert verdict.crossover(8) == pytest.approx(tokens / 8, rel=0.02)
        rows = {row.name: row for row in decode.rows_of(verdict)}
        assert all(row.ok for row in rows.values() if row.target is not None)
        assert rows["2 ranks, 1 KV head(s), made up, 65536 tokens: helix ÷ local"].value < 1
    never = decode.judge(case, "made up", made_up_decodes(decode, 0.0), decode.QUICK_KNOWN, link)
    assert never.crossover(1) is None and never.costs.crossover(1) is None
    assert [row.ok for row in decode.rows_of(never) if "crossover none up to 65536" in row.name] == [True]


def test_a_rule_of_other_times_than_judged_is_off_and_regretted(decode) -> None:
    """By heads it takes 2 s more where it is judged, so that queries should travel always: the rule saw otherwise."""
    link = decode.LinkCosts(0.0, 1e12)
    measured = made_up_decodes(decode, 1.0, noise=2.5)
    verdict = decode.judge(decode.Case(2, 1), "made up", measured, decode.QUICK_KNOWN, link)
    rows = [row for row in decode.rows_of(verdict) if row.target is not None]
    assert verdict.crossover(1) is None and not any(row.ok for row in rows if "1 request(s)" in row.name)
    assert verdict.regret(1, 1024) == pytest.approx((1 + 1.024 + 2.5) / (3 + 0.512) - 1)


@pytest.fixture
def batching(common, monkeypatch: pytest.MonkeyPatch):
    import batching

    return batching


def served(batching, tokens, times, arrived=(0.0, 0.0)):
    return batching.Served([list(each) for each in tokens], [list(each) for each in times], list(arrived))


def test_a_page_keeps_the_tables_of_other_models(common, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Results\n")
    for table, block in (("| first |", ""), ("| large |", "1 GB"), ("| second |", "")):
        common._fill_in(page, table, block)
    found = [line for line in page.read_text().splitlines() if "begin" not in line and "end of" not in line]
    assert found == ["# Results", "| second |", "| large |"]


def test_a_piggybacked_decode_by_hand(batching, common) -> None:
    """64 prompt tokens take 64 s, 61 of them and 3 decodes 67 s: 2 s each; alone 4 take 20 s."""
    slow = (1.0, 3.0, 2.0)  # a machine that slows down by turns
    prompt, decode, mixed = (
        common.Timing(name, tuple(seconds * turn for turn in slow))
        for name, seconds in (("prompt", 64.0), ("decode", 20.0), ("mixed", 67.0))
    )
    mix = batching.Piggyback(64, 4, prompt, decode, mixed)
    assert [timing.rounds[0] for timing in mix.marginal_s()] == pytest.approx([2.0, 5.0])
    found = batching.Found("made up", 1, [mix], None, [])
    (row,) = batching.rows_of(found)
    assert (row.value, row.target, row.ok) == (pytest.approx(0.4), 0.35, False)
    assert row.interval == pytest.approx((0.4, 0.4))


def test_policies_are_judged_by_hand(batching) -> None:
    """Two requests of three tokens; the second of them comes at 1 s."""
    runs = {
        "one at a time": served(batching, [[1] * 3] * 2, [(2, 3, 4), (6, 7, 8)], (0.0, 1.0)),
        "PrefillFirst": served(batching, [[1] * 3] * 2, [(1, 3, 4), (2, 3, 4)], (0.0, 1.0)),
        "StallFree": served(batching, [[1] * 3] * 2, [(1.0, 1.5, 2.0), (1.25, 1.5, 2.0)], (0.0, 1.0)),
    }
    assert runs["one at a time"].tokens_per_s == 6 / 8 and runs["one at a time"].first_s == [2.0, 5.0]
    assert runs["PrefillFirst"].gaps_s == [2, 1, 1, 1]
    rows = {row.name: row for row in batching.policy_rows("it", {name: [run] * 3 for name, run in runs.items()})}
    throughput, worst = (
        rows["it: StallFree: throughput ÷ one at a time"],
        rows["it: StallFree: worst TBT ÷ PrefillFirst"],
    )
    assert (throughput.value, throughput.target, throughput.ok) == (4.0, 3.0, True)
    assert (worst.value, worst.target, worst.ok) == (0.25, 0.3, True)
    assert rows["it: PrefillFirst: throughput ÷ one at a time"].ok is None


def test_tokens_must_be_those_of_each_request_alone(batching, common) -> None:
    expected = served(batching, [[1, 2, 3], [4, 5]], [(1, 2, 3), (1, 2)])
    margins = [[0.5, 1e-6, 0.5], [0.5, 0.5]]
    assert batching.compare("it", expected, expected, margins) == 0
    close = served(batching, [[1, 7, 8], [4, 5]], [(1, 2, 3), (1, 2)])
    assert batching.compare("it", close, expected, margins) == 2, "two logits are too close to say which is larger"
    for tokens, message in (
        ([[1, 2, 8], [4, 5]], "request 0 generates 8 instead of 3 at 2"),
        ([[1, 7, 8], [4, 6]], "request 1 generates 6 instead of 5 at 1"),
        ([[1, 2, 3], [4]], "request 1 has 1 tokens instead of 2"),
    ):
        with pytest.raises(common.WrongResultError, match=message):
            batching.compare("it", served(batching, tokens, expected.times), expected, margins)


def test_instances_are_joined_in_the_order_of_requests(batching) -> None:
    even = served(batching, [[1], [3]], [(1.0,), (3.0,)], (0.0, 2.0)), [0.1, 0.3]
    odd = served(batching, [[2, 2]], [(2.0, 2.5)], (1.0,)), [0.2, 0.25]
    whole, close = batching.joined([even, odd], 3)
    assert whole.tokens == [[1], [2, 2], [3]] and whole.arrived == [0.0, 1.0, 2.0] and whole.seconds == 3.0
    assert close == [[0.1], [0.2, 0.25], [0.3]]


def test_traces_are_the_same_for_a_seed(batching) -> None:
    arrivals = batching.trace(batching.LARGE, 1000, 16)
    assert arrivals == batching.trace(batching.LARGE, 1000, 16) != batching.trace(batching.LARGE, 1000, 16, seed=1)
    assert [len(each.prompt) for each in arrivals].count(192) == 4 and arrivals[-1].at > arrivals[11].at == 0
    requests = batching.poisson(2000, 0.5, 4, 1000)
    assert {(len(each.prompt), each.new) for each in requests} == {(8, 4)}
    assert requests[-1].at / 1999 == pytest.approx(0.5, rel=0.1)


def test_the_host_is_timed_and_reported(batching, tmp_path: Path) -> None:
    timings = batching.host(3)
    rows = batching.host_rows(timings)
    assert [row.unit for row in rows] == ["ms", "ms"] and all(0.001 < row.value < 50 for row in rows)
    text = batching.tables([], rows)
    assert text.count("| ≤ 0.3 |") == 2 and "256 decodes and two chunks" in text


@pytest.mark.slow
def test_batching_is_measured_whole_on_two_ranks(tmp_path: Path) -> None:
    found, page, picture = tmp_path / "found.json", tmp_path / "page.md", tmp_path / "found.png"
    options = ["--quick", "--models", "bundled", "--json", found, "--markdown", page, "--plot", picture]
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / "batching.py", *map(str, options)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    written = json.loads(found.read_text())
    assert [(each["model"], each["ranks"]) for each in written["meta"]["found"]] == [("bundled", 1), ("bundled", 2)]
    assert "bundled, 2 ranks: StallFree: worst TBT ÷ PrefillFirst" in ran.stdout and "11.2 x" in page.read_text()
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_batching_prints_nothing_over_wrong_tokens(tmp_path: Path) -> None:
    script = tmp_path / "benchmarks" / "batching.py"
    script.parent.mkdir()
    right = (BENCHMARKS / "batching.py").read_text()
    wrong = right.replace("found.tokens[number].append(token)", "found.tokens[number].append(token + (live > steps))")
    assert wrong != right
    script.write_text(wrong)
    (script.parent / "common.py").write_text((BENCHMARKS / "common.py").read_text())
    (tmp_path / "examples").symlink_to(BENCHMARKS.parent / "examples")
    ran = subprocess.run(
        [sys.executable, script, "--quick", "--models", "bundled", "--ranks", "1", "--only", "policies"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1 and not ran.stdout
    assert "WRONG RESULT" in ran.stderr and "instead of" in ran.stderr


@pytest.fixture
def bubbles(common, monkeypatch: pytest.MonkeyPatch):
    import pipeline

    return pipeline


def test_bubbles_are_predicted_beside_what_was_published(bubbles) -> None:
    """Every token of every request is computed once, whatever the batches; chunks leave fewer bubbles than prompts."""
    model = bubbles.paper_pipeline
    lengths = model.lengths_of(40)
    assert all(1024 <= prompt + new <= 4096 and prompt // new in (9, 10) for prompt, new in lengths)
    works = {}
    for name, found in {
        "orca": model.composed(lengths, bubbles.FullHybrid(), 5, 4),
        "sarathi": model.composed(lengths, bubbles.DecodeMaximal(256), 5, 4),
        "together": model.together(lengths, 5, 4),
    }.items():
        assert sum(work.tokens for work in found.works) == sum(prompt + new - 1 for prompt, new in lengths)
        pairs = sum(work.pairs + work.cached for work in found.works)
        assert pairs == sum((n := prompt + new - 1) * (n + 1) // 2 for prompt, new in lengths)
        assert sum(len(ids) for ids in found.ids) >= sum(new for _, new in lengths)
        works[name] = max(work.tokens for work in found.works)
    assert works["sarathi"] <= 256 + 5 < works["orca"] < works["together"]
    found = model.predict(bubbles.A100, 40)
    rows = bubbles.beside(found)
    wanted = [(name, bubbles._RESULTS[key]) for key, name in bubbles.RESULTS.items()]
    assert [(name, value) for name, value, _, _ in rows] == wanted
    assert rows[0][2] > 2, "fewer bubbles; 40 requests are hardly enough to be faster"
    assert all(row.name.startswith(("published", "predicted")) for row in bubbles.predicted_rows(found))


@pytest.mark.slow
def test_bubbles_are_measured_on_two_stages(tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("out.json", "out.md", "out.png")]
    options = [part for pair in zip(("--json", "--markdown", "--plot"), outs, strict=True) for part in pair]
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / "pipeline.py", "--quick", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    names = {row["name"] for row in json.loads(outs[0].read_text())["rows"]}
    assert {"measured, Orca: bubbles of stage 1", "SARATHI ÷ Orca: bubbles, measured"} <= names
    assert "| 6.29x |" in outs[1].read_text() and outs[2].stat().st_size


@pytest.fixture
def simulate(common, monkeypatch: pytest.MonkeyPatch):
    import simulate

    return simulate


def test_what_an_engines_step_has_to_do_by_hand(simulate) -> None:
    """A decode over 9 keys, 3 tokens of a prompt behind 4, one of 1 token, which is none."""
    assert simulate.work_of([1, 3, 1], [9, 7, 1], 2) == simulate.plan.StepWork(5, 3 * 4 + 6 + 1, 9, 7 + 1, 1, 2)


def test_costs_are_fitted_where_they_are_sums(simulate) -> None:
    """Of 1 + 2 a token + 3 a row, with nothing else to be seen: what is left out weighs nothing, or next to it."""
    works = [simulate.plan.StepWork(n, pairs=n * n, rows=n % 3) for n in range(1, 40)]
    rows = [simulate.features(work) for work in works]
    weights = simulate.fit(rows, [1.0 + 2.0 * work.tokens + 3.0 * work.rows for work in works])
    assert min(weights) >= 0
    for row, work in zip(rows, works, strict=True):
        assert simulate.dot(weights, row) == pytest.approx(1.0 + 2.0 * work.tokens + 3.0 * work.rows, rel=1e-3)


@pytest.fixture
def predict(common, monkeypatch: pytest.MonkeyPatch):
    import predict

    return predict


def test_measured_segments_are_replayed_by_hand(predict) -> None:
    """Around the programs one after another; two programs of two slots each hide one collective each."""
    link = predict.SimulatedLink(0.5, 2.0)
    one = predict.Segments(1.0, (1,), (((1.0, 1), (2.0, -1)),))
    assert (one.seconds(None), one.seconds(link)) == (4.0, 4.0 + 1.0 + 1.0)
    two = predict.Segments(0.0, (), (((1.0, 1), (2.0, -1)), ((3.0, 1), (1.0, -1))))
    assert two.seconds(link) == 1.0 + 3.0 + 2.0 + 1.0  # the first sum under 3, the second under 2
    assert predict.Step(1, 256, 3).lengths == ([1, 1, 1], [256, 257, 258]) and predict.Step(8).lengths == ([8], [0])
    layouts = [predict.Layout(1, 2), predict.Layout(2, 1)]
    assert (
        len(predict.ways_of(predict.Step(8), layouts)) == 6 and len(predict.ways_of(predict.Step(1, 4), layouts)) == 2
    )
    case = predict.Case(2, "", predict.Step(8), predict.Way(layouts[0], 1), 9.0, 10.0, None)
    assert case.error == pytest.approx(0.1)
    assert predict.Chosen(2, "", predict.Step(8), *[predict.Way(layouts[0], 1)] * 2, 3.0, 2.0, "").regret == 0.5


@pytest.mark.slow
def test_steps_are_predicted_and_measured(tmp_path: Path) -> None:
    """A look: targets are for the whole run on a quiet machine."""
    outs = [tmp_path / name for name in ("out.json", "out.md", "out.png")]
    options = [part for pair in zip(("--json", "--markdown", "--plot"), outs, strict=True) for part in pair]
    script = [sys.executable, BENCHMARKS / "predict.py", "--quick", *map(str, options)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    content = json.loads(outs[0].read_text())
    assert len(content["meta"]["cases"]) == 115 and len(content["meta"]["chosen"]) == 20
    assert content["rows"][0]["value"] < 0.5 and "| regret |" in outs[1].read_text() and outs[2].stat().st_size


@pytest.fixture
def scaling(common, monkeypatch: pytest.MonkeyPatch):
    import scaling

    return scaling


def test_a_technique_pays_until_twice_the_ranks_save_little(scaling) -> None:
    def line(regime: str, *points: float) -> object:
        return scaling.Line("8B", "a fabric", regime, "tp", {1 << i: point for i, point in enumerate(points)})

    assert (line("strong prompt", 8, 4, 3.7, 1).until, line("strong prompt", 8, 4, 3).until) == (2, 4)
    assert (line("strong prompt", 8, 4, 3).ends, line("strong prompt", 8, 4, 3.7).ends) == (True, False)
    assert (line("weak decode", 1, 0.6, 0.4, 0.7).until, line("weak decode", 1).until) == (2, 1)


def test_scaling_is_as_it_was_written(scaling) -> None:
    """One model again; every model, fabric, regime and technique has a line."""
    written = json.loads((BENCHMARKS.parent / "docs/results/scaling.json").read_text())["meta"]["lines"]
    keys = {(line["model"], line["fabric"], line["regime"], line["technique"]) for line in written}
    assert len(keys) == len(written) == 3 * 3 * 16
    kept = {key: line["points"] for line in written if (key := tuple(line[name] for name in scaling.Line._fields[:4]))}
    for line in scaling.scaling(("8B",)):
        points = {str(p): value for p, value in line.points.items()}
        assert kept[line[:4]] == pytest.approx(points)


@pytest.mark.slow
def test_kernels_are_checked_on_a_cpu() -> None:
    """Every case of the benchmark, at a tiny size, in Triton's interpreter."""
    script = [sys.executable, BENCHMARKS / "kernels.py", "--device", "cpu"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "every kernel gives what its definition gives" in ran.stdout
