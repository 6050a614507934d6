"""Loading by slices: equal to the whole model, at the cost of the slices; every mismatch refused on every rank."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from seqpar import comm, hf, layers
from seqpar.hf.checkpoint import Checkpoint
from tests.hf.test_generate import NAME, generate
from tests.hf.tiny import ARCHITECTURES, left_padded, prompts, tiny_model
from tests.ranks import LAYOUTS, SMALL, run_mesh, thinned


def saved(path: Path, kind: str, *, max_shard_size: str = "50GB", **overrides: Any) -> Path:
    """A checkpoint as Transformers writes it."""
    model = tiny_model(kind, **overrides)
    model.generation_config = GenerationConfig(max_new_tokens=4, pad_token_id=3)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def loads(mesh: comm.DeviceMesh, path: str, sharded: bool) -> tuple[dict[str, int], list[tuple[str, int, int]], int]:
    """Compare with Transformers' loader; hand back what was read."""
    model = hf.load(path, mesh, sequence_sharded=sharded)
    reference = AutoModelForCausalLM.from_pretrained(path)
    assert not model.training and model.dtype == reference.dtype and model.device.type == "cpu"
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    whole = reference.state_dict()
    gathered = model.seqpar.gather_state_dict()
    for name, tensor in gathered.items():
        assert torch.equal(tensor, whole[name]), name
    assert gathered.keys() == whole.keys()
    ids, mask = left_padded(prompts(2, 7), (0, 3))
    expected = generate(reference, input_ids=ids, attention_mask=mask)
    assert torch.equal(generate(model, input_ids=ids, attention_mask=mask), expected)
    report, owned = model.seqpar.report, []
    for name, _, _, source in layers.iter_sources(model):
        size = sum(piece.full.size for piece in source.pieces)
        owned.append((name, source.dim, size))
    return report._asdict(), owned, sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=NAME)
def test_equals_transformers_and_reads_its_slices_only(tmp_path: Path, layout: tuple[int, int]) -> None:
    kind = ARCHITECTURES[(layout[0] + 2 * layout[1]) % 4]
    path = saved(tmp_path, kind, max_shard_size="20KB" if layout[0] % 2 else "50GB")
    sizes = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
    for report, owned, stored in run_mesh(layout, loads, str(path), False):
        assert {name for name, *_ in owned} == set(sizes)
        elements = 0
        for name, dim, size in owned:
            shape = list(sizes[name])
            shape[dim] = size
            elements += torch.Size(shape).numel()
        assert report["bytes_read"] == 8 * elements == report["weight_bytes"] == stored
        whole = 8 * sum(torch.Size(shape).numel() for shape in sizes.values())
        assert layout[0] == 1 or report["bytes_read"] < whole


def test_sequence_sharded(tmp_path: Path) -> None:
    run_mesh((2, 1), loads, str(saved(tmp_path, "qwen3")), True)


def converts(mesh: comm.DeviceMesh, path: str, dtype: torch.dtype | None) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        model = hf.load(path, mesh, dtype=dtype, progress=True)
    assert ("loading: 100%" in shown.getvalue()) == (comm.groups(mesh).flat.rank() == 0)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    assert model.dtype == reference.dtype
    for name, tensor in model.seqpar.gather_state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name])
    with torch.no_grad():
        assert torch.isfinite(model(prompts(1, 4)).logits).all()
    with pytest.raises(
        ValueError, match="`undo` must be called on a model that had its weights, got one read by slices"
    ):
        model.seqpar.undo()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype | None) -> None:
    path = saved(tmp_path, "llama")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    edit(path / "config.json", lambda config: config.pop("dtype"))
    run_mesh((1, 1), converts, str(path), dtype)


def test_files_that_hold_more_than_is_needed(tmp_path: Path) -> None:
    """Rotary frequencies of old checkpoints, and the head of a tied model, equal to the embedding."""
    path = saved(tmp_path, "qwen2")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, path / "model.safetensors")
    run_mesh((1, 2), converts, str(path), None)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", lambda content: content.update(changes))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


NORM, HEAD = "model.norm.weight", "lm_head.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "`path` must be a directory with config.json, got"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "must hold valid JSON"),
    "another architecture": (config(model_type="gemma2"), "`path` must hold a model of LlamaForCausalLM, MistralFor"),
    "another head": (
        config(architectures=["LlamaForSequenceClassification"]),
        "got model_type 'llama' with architectures ['LlamaForSequenceClassification']",
    ),
    "another activation": (config(hidden_act="gelu"), "`hidden_act` must be silu, got gelu"),
    "quantized": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "`quantization_config` must be absent, got quantized weights",
    ),
    "other heads": (config(num_key_value_heads=3), "`model.layers.0.self_attn.k_proj.weight` must have shape [24, 48]"),
    "no head map": (config(num_key_value_heads=4), "`num_heads` must be a multiple of `num_kv_heads`, got 6 and 4"),
    "another vocabulary": (config(vocab_size=68), "must have shape [68, 48] as config.json says, got [67, 48]"),
    "more layers": (
        config(num_hidden_layers=4),
        "must hold every tensor of the model, got none named `model.layers.3.",
    ),
    "fewer layers": (config(num_hidden_layers=2), "must hold the tensors of the model only, got also `model.layers.2."),
    "no biases": (config(attention_bias=False), "got also `model.layers.0.self_attn.k_proj.bias`"),
    "a missing tensor": (weights(lambda tensors: tensors.pop(NORM)), "got none named `model.norm.weight`"),
    "an extra tensor": (weights(lambda tensors: tensors.update(more=torch.zeros(2))), "got also `more`"),
    "int8": (
        weights(lambda tensors: tensors.update({NORM: torch.zeros(48, dtype=torch.int8)})),
        "`model.norm.weight` must have one of the dtypes F64, F32, F16, BF16, got I8",
    ),
    "truncated": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
        "it is truncated or corrupt",
    ),
}


def refuses(mesh: comm.DeviceMesh, good: str, bad: str, message: str) -> None:
    """Only rank 1 sees the bad files: the others must not hang."""
    path = bad if comm.groups(mesh).flat.rank() == 1 else good
    with pytest.raises(ValueError) as error:
        hf.load(path, mesh)
    assert message in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("good"), "llama")


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_is_wrong_on_one_rank(good: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    run_mesh((2, 1), refuses, str(good), str(tmp_path), message)


def test_ties_that_the_weights_contradict(good: Path, tmp_path: Path) -> None:
    """Found only while reading, on the ranks whose rows differ: here on both."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config(tie_word_embeddings=True)(tmp_path)
    message = "`lm_head.weight` must equal `model.embed_tokens.weight`, as config.json ties them, got other numbers"
    run_mesh((2, 1), refuses, str(tmp_path), str(tmp_path), message)


def refuses_arguments(mesh: comm.DeviceMesh, path: str) -> None:
    rank = comm.groups(mesh).flat.rank()
    with pytest.raises(TypeError, match=r"`dtype` must be one of torch\.float64, .*, got torch\.int8"):
        hf.load(path, mesh, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"checkpoint, `dtype` and options must be the same on every rank, got another"
    ):
        hf.load(path, mesh, dtype=(torch.float32, torch.bfloat16)[rank])


def test_arguments(good: Path) -> None:
    run_mesh((2, 1), refuses_arguments, str(good))


def disk_fails(mesh: comm.DeviceMesh, path: str) -> None:
    """An error in the middle of reading, on one rank, is an error on all."""
    if comm.groups(mesh).flat.rank() == 1:
        Checkpoint.read = broken  # type: ignore[method-assign]  # the ranks of this test are its own
    with pytest.raises(ValueError, match="OSError: the disk is gone"):
        hf.load(path, mesh)


def broken(*_: Any) -> torch.Tensor:
    raise OSError("the disk is gone")


def test_a_disk_that_fails_on_one_rank(good: Path) -> None:
    run_mesh((1, 2), disk_fails, str(good), isolated=True)
