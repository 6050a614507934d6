"""The examples run as a user starts them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks, thinned

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *arguments: str, timeout_s: float = 480) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def test_demo_checks_every_layout_of_two_ranks() -> None:
    done = torchrun(2, "examples/demo.py", "--new-tokens", "8", "--prompt-tokens", "96")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tokens equal to Transformers'") == 12 and "WRONG" not in done.stdout
    assert all(name in done.stdout for name in ("2 x 1", "1 x 2", "1 x 2 shift", "1 x 2 ring"))


def test_demo_fails_on_a_wrong_token(tmp_path: Path) -> None:
    """The same script with one weight changed after loading must notice, and say where."""
    script = tmp_path / "wrong.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "import demo, seqpar\n"
        "load = seqpar.hf.load\n"
        "def broken(*args, **kwargs):\n"
        "    model = load(*args, **kwargs)\n"
        "    with torch.no_grad():\n"
        "        model.model.norm.weight.neg_()\n"
        "    return model\n"
        "seqpar.hf.load = broken\n"
        "sys.exit(demo.main())\n"
    )
    done = torchrun(1, str(script), "--new-tokens", "4", "--prompt-tokens", "32")
    assert done.returncode != 0 and "WRONG TOKEN in row" in done.stdout


@pytest.mark.slow
def test_demo_checks_every_layout_of_four_ranks() -> None:
    done = torchrun(4, "examples/demo.py", "--new-tokens", "16", timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tokens equal to Transformers'") == 15


def test_the_trace_of_two_chunks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = torchrun(2, "examples/trace.py", str(tmp_path / "trace.png"), "--tokens", "128")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "overlap ratio" in done.stdout and "(simulated link)" in done.stdout
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"


def example(name: str) -> Any:
    """An example as a module, in a process that has torch already; as a script, it finds its neighbours."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.append(str(ROOT / "examples"))
    return importlib.import_module(name)


def serves(rank: int, p: int, folder: str, given: list[str]) -> tuple[int, str]:
    """The engine: how it ends, and what it complains of."""
    engine = example("engine")
    given = [*given, "--pages", "8", "--jsonl", f"{folder}/requests.jsonl", "--share-prefixes"]
    given += ["--out", f"{folder}/answers.jsonl", "--plot", f"{folder}/engine.png"]
    with redirect_stderr(StringIO()) as complaints:
        return engine.main(given), complaints.getvalue()


SHIFTED = ["--sp", "2", "--shift", "8"]
STAGED = ["--pp", "2", "--overlap", "24"]


@pytest.mark.parametrize("given", [SHIFTED, STAGED], ids=["sp", "pp"])
def test_the_engine_serves_all_but_bad_lines(tmp_path: Path, given: list[str]) -> None:
    pytest.importorskip("matplotlib")
    lines = [
        '{"prompt": "import os\\n", "max_new_tokens": 4, "id": "a"}',
        "not json",
        '{"prompt": [5, 6], "temperature": 1, "seed": 2.5}',
        '{"prompt": [5, 6], "id": "a"}',
        '{"prompt": [5, 99999]}',
        '{"prompt": [5, 6, 7], "max_new_tokens": 3, "temperature": 1, "top_k": 20, "at_s": 0.01, "stop": "never"}',
        '{"prompt": [1, 2], "max_new_tokens": 5000}',
        '{"prompt": "\u2028 is no end of a line", "max_new_tokens": 2, "id": "b"}',
        '{"prompt": [5], "at_s": Infinity}',
        '{"prompt": [5], "temperature": 1' + "0" * 400 + "}",
        '{"prompt": [5], "stop": 3}',
        '{"prompt": 5}',
        '{"prompt": ' + "[" * 100_000,
        "[" * 10,
        '{"prompt": "caf\udce9"}',  # a byte that is no UTF-8
        '{"prompt": "import os\\n", "max_new_tokens": 24, "id": "c", "stop": ["o", "e", "i"]}',
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    (code, complaints), (other, _) = run_ranks(2, serves, str(tmp_path), given)
    assert (code, other) == (1, 0)
    refused = [2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 14, 15]
    found = {int(line.split(":")[2]): line for line in complaints.splitlines() if line.startswith("refused: ")}
    assert sorted(found) == refused, "each with its line"
    assert "`id` must be of no other request, got 'a' again" in found[4]
    assert "`at_s` must be finite and at least 0, got inf" in found[9] and "got something else" in found[12]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    served = {each["id"]: (each["finish"], len(each["tokens"])) for each in answers}
    stopped = served.pop("c")
    assert served == {"a": ("length", 4), 6: ("length", 3), "b": ("length", 2)}
    text = {each["id"]: each["text"] for each in answers}
    assert stopped[0] == "stop_string" and stopped[1] < 24 and not {*"oei"} & {*text["c"]} and len(text["a"]) > 3
    assert (tmp_path / "engine.png").read_bytes()[:4] == b"\x89PNG"


def generates(rank: int, p: int, options: list[str]) -> tuple[str, str]:
    """What `generate.py` returns, and what it prints."""
    with redirect_stdout(StringIO()) as printed:
        return example("generate").main(["import os\n", "--new-tokens", "6", *options]), printed.getvalue()


def test_text_is_generated_under_every_option() -> None:
    plain = run_ranks(2, generates, ["--tp", "2"])
    other = run_ranks(2, generates, ["--sp", "2", "--shift", "4", "--overlap", "auto"])
    assert len({text for text, _ in plain + other}) == 1 and plain[0][0].startswith("<s>import os\n")
    assert plain[0][0].removeprefix("<s>") in plain[0][1] and "bytes sent" in plain[0][1], "rank 0 prints"
    assert plain[1][1] == ""


def runs_custom_model(rank: int, p: int, tp: int, sp: int) -> str:
    """Its own comparison; and its logits beside those of Transformers' Qwen3, whose layers it has."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import seqpar
    from seqpar import comm
    from seqpar.ragged import RaggedBatch

    custom_model = example("custom_model")
    with redirect_stdout(StringIO()) as printed:
        custom_model.main(tp, sp)
    config = custom_model.Config()
    torch.manual_seed(1)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            tie_word_embeddings=False,
        )
    ).eval()
    for name, param in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(param, 0.5, 1.5)
    ours = custom_model.Model(config, comm.groups(seqpar.init_mesh(tp, sp, "cpu")))
    ours.load_state_dict({name.removeprefix("model."): value for name, value in theirs.state_dict().items()})
    ids = torch.randint(config.vocab_size, (37,))
    with torch.no_grad():
        logits = ours(ids, RaggedBatch.prefill([37]), None, range(37))
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=1e-4, atol=1e-4)
    return printed.getvalue()


@pytest.mark.parametrize("layout", thinned([(1, 2), (2, 1), (2, 2), (1, 4), (3, 1)], (1, 2).__eq__), ids=str)
def test_a_model_of_ones_own(layout: tuple[int, int]) -> None:
    (tp, sp), ranks = layout, layout[0] * layout[1]
    printed = run_ranks(ranks, runs_custom_model, tp, sp)
    assert printed == [f"tp={tp} sp={sp}: 36 tokens, all equal to those of one process\n", *[""] * (ranks - 1)]


def test_a_model_of_ones_own_is_short() -> None:
    assert len((ROOT / "examples/custom_model.py").read_text().splitlines()) < 120


def trains(rank: int, p: int, tp: int, sp: int, steps: int) -> str:
    with redirect_stdout(StringIO()) as printed:
        example("train_tp_sp").main(tp, sp, steps)
    return printed.getvalue()


@pytest.mark.parametrize("case", thinned([(1, 2, 3), (2, 1, 30), (2, 2, 30), (1, 3, 10)], (1, 2, 3).__eq__), ids=str)
def test_training_is_that_of_one_process(case: tuple[int, int, int]) -> None:
    printed = run_ranks(case[0] * case[1], trains, *case)
    assert "nats a byte, as in one process" in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["custom_model.py", "train_tp_sp.py", "generate.py"])
def test_examples_run_under_torchrun(script: str) -> None:
    done = torchrun(4, f"examples/{script}", "--tp", "2", "--sp", "2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_technique_is_drawn(ranks: int, tmp_path: Path) -> None:
    """The pictures of the documentation come out of runs of today's code; each is on a page of its name."""
    pytest.importorskip("matplotlib")
    done = torchrun(ranks, "benchmarks/timelines.py", str(tmp_path), "--repeats", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn, done.stdout
    for name in drawn:
        page = (ROOT / "docs" / name).with_suffix(".md")
        assert f"(pictures/{name})" in page.read_text()
