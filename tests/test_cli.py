"""The command line: what it prints, what it costs to ask for help, and that what is wrong is one line and exit 2."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seqpar import plan
from seqpar.cli import main, parsing
from tests.ranks import run_ranks

CONFIG = str(Path(__file__).parent.parent / "examples" / "tiny-llama" / "config.json")
LINE = '{"at_s": 0.5, "prompt_tokens": 20, "new_tokens": 4}'
SIMULATE = ["simulate", "--model", CONFIG, "--hardware", "h100"]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that succeeds."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_help_costs_no_torch() -> None:
    code = (
        "import sys; from seqpar.cli import main\n"
        "for given in (['--help'], ['simulate', '--help'], ['simulate', '--tp', '0']):\n"
        "    try: main(given)\n"
        "    except SystemExit as end: print(end.code)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("usage: python -m seqpar") and lines[-2:] == ["2", "False"]
    for word in ("plan", "calibrate", "simulate", "info", "JSONL", "RANK:AT[:BACK]"):
        assert word in done.stdout
    assert done.stderr.count("\n") == 1


def test_it_is_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "seqpar", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "invalid choice: 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["plan", "--model", CONFIG], "the following arguments are required: --hardware"),
        (["plan", "--model", "nowhere", "--hardware", "h100"], "argument --model: there is no nowhere"),
        (["plan", "--model", CONFIG, "--hardware", "h999"], "`--hardware` must be one of 4090, "),
        (
            ["plan", "--model", CONFIG, "--hardware", "h100", "--network", "mail"],
            "`--network` must be one of ib-hdr200, ",
        ),
        (["plan", "--model", __file__, "--hardware", "h100"], "`config` must hold JSON, got "),
        (
            ["plan", "--model", CONFIG, "--hardware", "h100", "--prompt", "32q"],
            "argument --prompt: a size must be at least",
        ),
        ([*SIMULATE, "--tp", "3", "--ranks", "8"], "`--ranks` must be a multiple of tp * sp * stages (3), got 8"),
        (
            [*SIMULATE, "--stages", "2,x"],
            "argument --stages: stages must be a number such as 4 or weights such as 3,3,2",
        ),
        ([*SIMULATE, "--fail", "1"], "argument --fail: it must be written RANK:AT[:BACK], got '1'"),
        ([*SIMULATE, "--fail", "7:1"], "`rank` must be in [0, 1), got 7"),
        ([*SIMULATE, "--straggler", "0:0.5"], "`factor` must be at least 1"),
        ([*SIMULATE, "--rate", "inf"], "argument --rate: a number must be finite and above 0, got 'inf'"),
        ([*SIMULATE, "--costs", CONFIG], "`--costs` must be given without `--model` and `--hardware`, got both"),
        (["simulate"], "`--model` and `--hardware` must be given, or `--costs`, got neither"),
        (["simulate", "--costs", CONFIG], "`--pages` must be given with `--costs`, which know no memory, got none"),
        (["simulate", "--costs", CONFIG, "--pages", "9"], "`path` must hold step costs as `save` writes them"),
        (["calibrate", "--model", CONFIG, "--tokens", "8", "4"], "`--tokens` must increase, got 8 4"),
        (["info", "--jason"], "unrecognized arguments: --jason"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = main(arguments)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("python -m seqpar") and printed.err.count("\n") == 1
    assert message in printed.err


def test_a_malformed_trace_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").write_text(f"{LINE}\n{LINE[:-1]}\n")
    assert main([*SIMULATE, "--trace", str(tmp_path / "trace.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "trace.jsonl:2: Expecting" in error and error.count("\n") == 1


def test_a_model_that_fits_nowhere_says_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = json.loads(Path(CONFIG).read_text()) | {"hidden_size": 65536, "num_hidden_layers": 200}
    (tmp_path / "config.json").write_text(json.dumps(huge | {"intermediate_size": 1 << 18}))
    for command in (["plan", "--ranks", "8"], ["simulate", "--tp", "8"]):
        assert main([*command, "--model", str(tmp_path), "--hardware", "h100"]) == 2
        error = capsys.readouterr().err
        assert "GB too" in error and error.count("\n") == 1


def test_a_plan_is_a_table_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given = ["plan", "--model", CONFIG, "--hardware", "h200", "--ranks", "1", "--prompt", "4k"]
    found = said([*given, "--objective", "latency", "--explain"], capsys)
    assert "plans compared; those that no other beats, best latency first" in found and "TPOT ms" in found
    assert "memory of a rank" in found
    content = json.loads(said([*given, "--json", "--plot", str(tmp_path / "plan.png")], capsys))
    model, hardware = plan.Model.from_config(CONFIG), plan.HARDWARE["h200"]
    best = plan.best(model, hardware, plan.Workload(4096, 256), ranks=1)
    assert [each["name"] for each in content] == [each.name for each in best.frontier]
    assert content[0]["tokens_per_s"] == pytest.approx(best.chosen.tokens_per_s)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_a_simulation_is_a_table_json_rows_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    given = [
        *SIMULATE,
        "--ranks",
        "8",
        "--tp",
        "2",
        "--stages",
        "2",
        "--requests",
        "20",
        "--rate",
        "100",
        "--prompt",
        "64",
    ]
    given += ["--new", "8", "--straggler", "3:1.5", "--fail", "0:0.1:0.1", "--policy", "decode-maximal"]
    files = {name: str(tmp_path / name) for name in ("trace.jsonl", "rows.jsonl", "found.png")}
    more = ["--write-trace", files["trace.jsonl"], "--rows", files["rows.jsonl"], "--plot", files["found.png"]]
    table = said([*given, *more], capsys)
    assert table.startswith("8 ranks: 2 replicas of tp x sp 2x1, 2 stages; ") and "20 of 20 requests in " in table
    rows = [json.loads(line) for line in Path(files["rows.jsonl"]).read_text().splitlines()]
    assert len(rows) == 20 and {row["replica"] for row in rows} == {0, 1}
    assert Path(files["found.png"]).read_bytes()[:4] == b"\x89PNG"
    drawn = json.loads(said([*given, "--json"], capsys))
    again = json.loads(said([*given, "--json", "--trace", files["trace.jsonl"]], capsys))
    assert drawn == again and drawn["ttft_s"]["most"] == max(row["ttft_s"] for row in rows)


def small(rank: int, folder: str) -> None:
    """A config of a model that takes no time, from rank 0 for all."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "llama", "vocab_size": 32, "intermediate_size": 24, **sizes}
    if rank == 0:
        Path(folder, "config.json").write_text(json.dumps(config))
    while not Path(folder, "config.json").exists():
        pass


def measure(rank: int, p: int, folder: str) -> int:
    small(rank, folder)
    given = ["calibrate", "--model", folder, "--sp", str(p), "--tokens", "8", "--rounds", "1", "--layers", "1"]
    return main([*given, "--device", "cpu", "--out", f"{folder}/costs.json"])


def test_costs_are_measured_on_two_ranks_and_simulated_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, measure, str(tmp_path)) == [0, 0]
    costs = plan.StepCosts.load(tmp_path / "costs.json")
    assert set(costs.curves) == {(1, 2), (2, 1)} and "2 rank(s) of cpu" in costs.source
    given = ["simulate", "--costs", str(tmp_path / "costs.json"), "--sp", "2", "--pages", "64", "--requests", "5"]
    found = json.loads(said([*given, "--prompt", "8", "--new", "4", "--shift", "4", "--json"], capsys))
    assert [(each["tp"], each["sp"]) for each in found["layouts"]] == [(1, 2), (2, 1)]
    assert main([*given, "--tp", "2"]) == 2
    assert "`--tp` and `--sp` must be of 1x2, 2x1, which were measured, got 2x2" in capsys.readouterr().err


def hardware(rank: int, p: int, folder: str) -> int:
    small(rank, folder)
    given = ["calibrate", "--model", folder, "--sp", str(p), "--tokens", "1", "8", "--rounds", "1", "--device", "cpu"]
    assert main([*given, "--hardware", f"{folder}/here.json", "--out", f"{folder}/costs.json"]) == 2
    return main([*given, "--hardware", f"{folder}/here.json"])


def test_hardware_is_measured_on_two_ranks_and_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, hardware, str(tmp_path)) == [0, 0]
    file = str(tmp_path / "here.json")
    found = plan.Hardware.load(file)
    assert found.most_ranks == 2 and found.accelerator.operators and "sums over 2" in found.explain()
    given = [
        "plan",
        "--model",
        str(tmp_path / "config.json"),
        "--hardware",
        file,
        "--prompt",
        "64",
        "--new",
        "8",
        "--json",
    ]
    plans = json.loads(said(given, capsys))
    assert {each["replicas"] * each["tp"] * each["sp"] * each["pp"] for each in plans} == {2}
    half = json.loads(said([*given, "--weight-bytes", "2", "--kv-bytes", "2"], capsys))
    assert max(each["capacity"] for each in half) > 1.5 * max(each["capacity"] for each in plans)
    (tmp_path / "here.json").write_text("{}")
    assert main(given) == 2
    assert "`path` must hold hardware as `save` writes it, got" in capsys.readouterr().err


def test_info_says_which_kernels_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(["info", "--json"], capsys))
    assert found["versions"]["torch"] and "gloo" in found["collectives"]
    assert set(found["kernels"]) >= {"attention", "rms_norm"} and found["kernels"]["attention"]["cpu float32"]
    table = said(["info"], capsys)
    assert "kernels" in table and "cpu float32: " in table


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parsing.count, "0"),
        (parsing.count, "1.5"),
        (parsing.count, "-3"),
        (parsing.duration, "-1"),
        (parsing.positive, "0"),
        (parsing.shares, "0"),
        (parsing.shares, "1,-1"),
    ],
)
def test_values_that_are_none(parse: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got '"):
        parse(text)


def test_values_as_they_are_written() -> None:
    assert [parsing.count(text) for text in ("7", "32k", "1.5k", "1M")] == [7, 32768, 1536, 1 << 20]
    assert parsing.shares("2") == (0.5, 0.5) and parsing.shares("3,1") == (0.75, 0.25)
    assert parsing.duration("0") == 0.0 and parsing.positive("2.5") == 2.5
