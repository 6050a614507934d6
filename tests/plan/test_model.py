"""Models from configs: parameters against a checkpoint and published counts, work against counting, refusals."""

from __future__ import annotations

import json
import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest

from seqpar.plan import FAMILIES, Model, StepWork

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


def test_parameters_are_those_of_the_checkpoint() -> None:
    """All of the bundled model's but its norms, told by the file's header."""
    path = ROOT / "examples/tiny-llama"
    with next(path.glob("*.safetensors")).open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    held = sum(prod(each["shape"]) for name, each in header.items() if name != "__metadata__" and "norm" not in name)
    for config in (path, str(path / "config.json"), json.loads((path / "config.json").read_text())):
        assert Model.from_config(config).parameters == held
    assert Model.from_config(path).name == "tiny-llama"


@pytest.mark.parametrize(
    ("config", "billions"), [(LLAMA, 70.55), (MIXTRAL, 46.7), (QWEN_MOE, 30.53)], ids=["llama", "mixtral", "qwen3_moe"]
)
def test_parameters_are_the_published_ones(config: dict[str, Any], billions: float) -> None:
    model = Model.from_config(config)
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    tied = Model.from_config(config | {"tie_word_embeddings": True})
    assert model.parameters - tied.parameters == config["vocab_size"] * config["hidden_size"]


def test_mixtures_are_where_the_config_says() -> None:
    assert Model.from_config(QWEN_MOE).moe_layers == 48
    assert Model.from_config(QWEN_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}).moe_layers == 22


def test_windows_are_where_the_config_says() -> None:
    assert Model.from_config(LLAMA | {"sliding_window": 4096}).windowed_layers == 0  # which Llama does not read
    assert Model.from_config(LLAMA | {"model_type": "mistral", "sliding_window": 4096}).windowed_layers == 80
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 70}
    assert Model.from_config(qwen | {"use_sliding_window": False}).window is None
    assert Model.from_config(qwen | {"use_sliding_window": True}).windowed_layers == 10
    kinds = ["full_attention", "sliding_attention"] * 40
    assert Model.from_config(qwen | {"use_sliding_window": True, "layer_types": kinds}).windowed_layers == 40


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_work_is_what_counting_finds(window: int | None) -> None:
    new, cached = [5, 1, 2, 1, 1], [0, 7, 3, 0, 2]
    found = StepWork.of(new, cached, window)
    pairs = keys = seen = 0
    for n, old in zip(new, cached, strict=True):
        rows = [min(position + 1, window or position + 1) for position in range(old, old + n)]
        if n == 1 and old:
            seen += sum(rows)
        else:
            pairs += sum(rows)
            keys += n + min(old, old if window is None else window - 1)
    assert found == StepWork(10, pairs, seen, keys, decodes=2, rows=5)


def test_windowed_layers_see_less() -> None:
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 60}
    work, lens = Model.from_config(qwen).work, [[64, 1], [0, 100]]
    full, near = StepWork.of(*lens), StepWork.of(*lens, 8)
    assert work(*lens).pairs == pytest.approx(0.75 * full.pairs + 0.25 * near.pairs)
    assert work(*lens).cached == pytest.approx(0.75 * full.cached + 0.25 * near.cached)


def test_every_family_that_is_loaded_is_known() -> None:
    listed = re.search(r"ARCHITECTURES = \{(.*?)\}", (ROOT / "src/seqpar/hf/models.py").read_text(), re.DOTALL)
    assert listed and set(re.findall(r'"(\w+)":', listed[1])) == set(FAMILIES)


def test_configs_that_are_refused(tmp_path: Path) -> None:
    for family in ("gpt2", None):
        with pytest.raises(ValueError, match=f"`model_type` must be one of llama, .*got {family!r}"):
            Model.from_config(LLAMA | {"model_type": family})
    with pytest.raises(ValueError, match="got none named 'vocab_size'"):
        Model.from_config({name: value for name, value in LLAMA.items() if name != "vocab_size"})
    with pytest.raises(ValueError, match="must have numbers"):
        Model.from_config(LLAMA | {"vocab_size": None})
    with pytest.raises(ValueError, match="sizes of a model must be at least 1"):
        Model.from_config(LLAMA | {"num_hidden_layers": 0})
    with pytest.raises(ValueError, match="at least as many experts"):
        Model.from_config(MIXTRAL | {"num_experts_per_tok": 9})
    with pytest.raises(ValueError, match="a file that can be read"):
        Model.from_config(tmp_path / "nothing.json")
    for text, message in (("{", "must hold JSON"), ("[1]", "a JSON object, got .* with a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Model.from_config(tmp_path)
    for new, cached in (([0], 0), ([1], -1), ([1, 2], [3])):
        with pytest.raises(ValueError, match="`lens_new` must be at least 1"):
            StepWork.of(new, cached)
