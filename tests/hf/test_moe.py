"""Mixtral and Qwen3-MoE: the tokens, weights and files of Transformers, with experts sliced or owned by ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from seqpar import comm, hf, layers
from seqpar.partition import Interleave, Layout, Shift, even_ranges, shard_range
from tests.hf.test_generate import NAME, generate, logits
from tests.hf.tiny import left_padded, prompts, tiny_model
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned

KINDS = ("mixtral", "qwen3_moe")
PLACES = ("tp", "ep")
LAYOUTS = [(2, 1), (1, 3), (2, 2)]


def decodes_as_transformers(mesh: comm.DeviceMesh, kind: str, experts: str, options: dict[str, Any]) -> None:
    model = tiny_model(kind)
    ids, mask = left_padded(prompts(3, 8), (2, 0, 5))
    expected = generate(model, input_ids=ids, attention_mask=mask), logits(model, ids, mask)
    with hf.parallelize(model, mesh, experts=experts, **options) as parallel:
        found = generate(model, input_ids=ids, attention_mask=mask), logits(model, ids, mask)
        assert torch.equal(found[0], expected[0]), (found[0], expected[0])
        # Transformers rounds norms and the probabilities of experts to float32.
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
        memory = parallel.memory()
        assert memory.extra_bytes == 0
    assert torch.equal(generate(model, input_ids=ids, attention_mask=mask), expected[0])


@pytest.mark.parametrize("layout", thinned(LAYOUTS, ((2, 2),).__contains__), ids=NAME)
@pytest.mark.parametrize("experts", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_a_left_padded_batch(kind: str, experts: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, decodes_as_transformers, kind, experts, {})


@pytest.mark.parametrize("experts", thinned(PLACES, "ep".__eq__))
def test_with_other_techniques(experts: str) -> None:
    """Sequence-sharded activations, chunks that take turns, a layout for every size of step."""
    run_mesh((2, 1), decodes_as_transformers, "mixtral", experts, {"sequence_sharded": True})
    run_mesh((2, 2), decodes_as_transformers, "qwen3_moe", experts, {"overlap": Interleave(2, min_tokens=4)})
    run_mesh((1, 2), decodes_as_transformers, "qwen3_moe", experts, {"overlap": hf.AutoOverlap(min_tokens=4)})
    shift = Shift(((1, Layout(4, 1)), (5, Layout(2, 2)), (20, Layout(1, 4))))
    run_mesh((1, 4), decodes_as_transformers, "mixtral", experts, {"shift": shift})


def trains(mesh: comm.DeviceMesh, kind: str, experts: str) -> None:
    """The loss, and every gradient through the model."""
    oracle, model = tiny_model(kind), tiny_model(kind)
    ids = prompts(2, 7)
    oracle(ids, labels=ids).loss.backward()
    with hf.parallelize(model, mesh, experts=experts) as parallel:
        model(ids, labels=ids).loss.backward()
        parallel.sync_gradients()
        whole = dict(oracle.named_parameters())
        for name, module, _, source in layers.iter_sources(model):
            want = [whole[name].grad.narrow(p.dim, p.full.start, p.full.size) for p in source.pieces]
            got = module._local(source, getattr(module, source.param).grad)
            torch.testing.assert_close(got, torch.cat(want, source.dim), rtol=1e-4, atol=1e-5, msg=f"{name} ".__add__)


@pytest.mark.parametrize("experts", PLACES)
def test_gradients(experts: str) -> None:
    run_mesh((2, 2), trains, "qwen3_moe", experts)
    run_mesh((2, 1), trains, "mixtral", experts)


def routes(mesh: comm.DeviceMesh, kind: str, dtype: torch.dtype) -> None:
    """Experts and weights are Transformers' own, bit for bit and in their dtype, whichever the model renormalises."""
    for overrides in ({},) if kind == "mixtral" else ({"norm_topk_prob": True}, {"norm_topk_prob": False}):
        block = tiny_model(kind, dtype=dtype, **overrides).model.layers[0].mlp
        router = layers.ParallelMoE.from_module(block, groups=comm.groups(mesh)).gate
        x = torch.randn(50, block.gate.weight.shape[1], dtype=dtype)
        with torch.no_grad():
            _, weights, ids = block.gate(x)
            ours, our_ids = router(x)
        assert torch.equal(our_ids, ids) and torch.equal(ours, weights) and ours.dtype == weights.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_router_is_transformers(kind: str, dtype: torch.dtype) -> None:
    run_mesh((1, 1), routes, kind, dtype)


def saved(path: Path, kind: str, *, as_held: bool = False) -> Path:
    """A checkpoint as the hub has it, or with the tensors that Transformers holds."""
    tiny_model(kind).save_pretrained(path, save_original_format=not as_held, max_shard_size="20KB")
    return path


def tensors_of(path: Path) -> dict[str, list[int]]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
    return found


def loads(mesh: comm.DeviceMesh, path: str, experts: str, out: str) -> dict[str, int]:
    """By slices, equal to Transformers' loader; what is saved it loads again. Hands back what was read."""
    model = hf.load(path, mesh, experts=experts)
    reference = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    whole, gathered = reference.state_dict(), model.seqpar.gather_state_dict()
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in gathered.items())
    ids, mask = left_padded(prompts(2, 7), (0, 3))
    expected = generate(reference, input_ids=ids, attention_mask=mask)
    assert torch.equal(generate(model, input_ids=ids, attention_mask=mask), expected)
    model.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())
    sizes = {name: param.nbytes for name, param in model.named_parameters()}
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return model.seqpar.report._asdict() | {"owned": sum(sizes.values()), "of_experts": of_experts}


@pytest.mark.parametrize("layout", thinned([(2, 1), (2, 2)], (2, 1).__eq__), ids=NAME)
@pytest.mark.parametrize("experts", PLACES)
def test_reads_its_slices_of_a_checkpoint(tmp_path: Path, experts: str, layout: tuple[int, int]) -> None:
    for kind, layer in (("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")):
        path = saved(tmp_path / kind, kind)
        names = tensors_of(path)
        one = f"model.layers.2.{layer}.experts.1.{'w1' if kind == 'mixtral' else 'gate_proj'}.weight"
        assert one in names and f"model.layers.2.{layer}.gate.weight" in names
        reports = run_mesh(layout, loads, str(path), experts, str(tmp_path / f"{kind}-saved"))
        count, hidden, width = (5, 24, 13) if kind == "mixtral" else (3, 20, 11)
        mixtures = 3 if kind == "mixtral" else 2
        assert tensors_of(tmp_path / f"{kind}-saved") == names
        for rank, report in enumerate(reports):
            assert report["bytes_read"] == report["weight_bytes"] == report["owned"]
            mine = count if experts == "tp" else even_ranges(count, len(reports))[rank].size
            rows = width if experts == "ep" else shard_range(width, Layout(*layout), rank // layout[1]).size
            assert report["of_experts"] == 8 * mixtures * mine * 3 * rows * hidden
            assert report["num_tensors"] == len(names) - 3 * mixtures * (count - mine)


@pytest.mark.parametrize("experts", thinned(PLACES, "ep".__eq__))
def test_reads_a_checkpoint_with_the_tensors_that_transformers_holds(tmp_path: Path, experts: str) -> None:
    for kind in KINDS:
        path = saved(tmp_path / kind, kind, as_held=True)
        assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(path)
        for report in run_mesh((2, 1), loads, str(path), experts, str(tmp_path / "saved")):
            assert report["bytes_read"] == report["owned"]


def refuses(mesh: comm.DeviceMesh, paths: dict[str, str]) -> None:
    model = tiny_model("mixtral")
    with own_errors(), pytest.raises(ValueError, match='`experts` must be "tp" or "ep", got \'all\''):
        hf.parallelize(model, mesh, experts="all")
    for name, value in (("output_router_logits", True), ("router_jitter_noise", 0.1)):
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=rf"`{name}` must be (False|0).*, got {value}"):
            hf.parallelize(model, mesh)
        setattr(model.config, name, type(value)(0))
    with hf.parallelize(model, mesh), pytest.raises(TypeError, match="`output_router_logits` must not be given"):
        model(prompts(1, 4), output_router_logits=True)
    for path, message in paths.items():
        with pytest.raises(ValueError) as error:
            hf.load(path, mesh)
        assert message in str(error.value), str(error.value)


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good", "mixtral")
    tensors = {}
    for file in good.glob("*.safetensors"):
        tensors |= load_file(file)
    last = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    changes: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "a missing matrix": ({last: None}, {}, f"must hold every tensor of the model, got none named `{last}`"),
        "a transposed one": (
            {last: tensors[last].T.contiguous()},
            {},
            f"`{last}` must have shape [13, 24] as config.json says, got [24, 13]",
        ),
        "another dtype": (
            {last: tensors[last].float()},
            {},
            "`model.layers.1.mlp.experts.gate_up_proj` must be stored in parts of one dtype, got F32, F64",
        ),
        "fewer experts": ({}, {"num_local_experts": 4}, "must hold the tensors of the model only, got also"),
    }
    paths = {}
    for name, (files, config, message) in changes.items():
        path = tmp_path / name
        path.mkdir()
        changed = {key: value for key, value in (tensors | files).items() if value is not None}
        save_file(changed, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(json.loads((good / "config.json").read_text()) | config))
        paths[str(path)] = message
    run_mesh((2, 1), refuses, paths)
