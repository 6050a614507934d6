"""The example engine is killed and started again: it finishes from its journal what it had begun."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from seqpar import comm
from tests.faults import bombs
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
REQUESTS = [
    {"prompt": "import os\n", "max_new_tokens": 9, "id": "a"},
    {"prompt": [5, 6, 7], "max_new_tokens": 12, "temperature": 0.9, "top_k": 20, "seed": 3},
    {"prompt": "def main(", "max_new_tokens": 2},
    {"prompt": "class Stack:\n    def", "max_new_tokens": 14, "id": "d", "at_s": 0.02},
]


def arguments(folder: Path, p: int) -> list[str]:
    files = [
        "--jsonl",
        f"{folder}/requests.jsonl",
        "--out",
        f"{folder}/answers.jsonl",
        "--journal",
        f"{folder}/journal",
    ]
    return ["--sp", str(p), "--tau", "16", *files]


def serves(rank: int, p: int, folder: Path, at: int | None, victim: int) -> Any:
    """The engine, in a process that has torch already; one of them dies before a launch."""
    spec = importlib.util.spec_from_file_location("engine", ROOT / "examples" / "engine.py")
    assert spec is not None and spec.loader is not None
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    with bombs.planted(bombs.die, at if rank == victim else None):
        try:
            return engine.main([*arguments(folder, p), "--timeout", "10"])
        except comm.CommError as error:
            return str(error)


def answers(folder: Path) -> dict[Any, tuple[str, list[int], str]]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    found = {line["id"]: (line["finish"], line["tokens"], line["text"]) for line in lines}
    assert len(found) == len(lines), "none doubled"
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, REQUESTS)))
    return tmp_path


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_what_was_begun_is_finished(folder: Path, victim: int) -> None:
    assert run_ranks(2, serves, folder, None, victim) == [0, 0]
    expected = answers(folder)
    assert set(expected) == {"a", 2, 3, "d"}
    for file in ("journal", "answers.jsonl"):
        (folder / file).unlink()
    reports = run_ranks(2, serves, folder, 60, victim, isolated=True, may_die=[victim])
    assert reports[1 - victim].startswith("step ") and not (folder / "answers.jsonl").exists()
    begun = (folder / "journal").read_bytes()
    assert begun, "it has been in the middle of them"
    assert run_ranks(2, serves, folder, None, victim) == [0, 0]
    assert answers(folder) == expected, "none lost"
    assert (folder / "journal").read_bytes().startswith(begun)
    assert run_ranks(2, serves, folder, None, victim) == [0, 0] and answers(folder) == expected, "with nothing to do"


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == parent:
            found.append(int(name.split()[0]))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_torchrun_starts_it_again(folder: Path, victim: int, fault: signal.Signals) -> None:
    """As a user has it: one command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=2"]
    lines = [{"prompt": [5 + i, 6, 7], "max_new_tokens": 100, "id": i} for i in range(8)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = [*arguments(folder, 2), "--timeout", "30", "--page-size", "32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    run = [*command, "examples/engine.py", *options]
    subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=240)
    expected = answers(folder)
    for file in ("journal", "answers.jsonl"):
        (folder / file).unlink()
    with subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as engine:
        while not (folder / "journal").exists() or (folder / "journal").read_bytes().count(b"\n") < 20:
            assert engine.poll() is None
            time.sleep(0.01)
        os.kill(children(engine.pid)[victim], fault)
        _, said = engine.communicate(timeout=240)
    assert engine.returncode == 0, said
    assert answers(folder) == expected
