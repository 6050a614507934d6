"""Swapping a model in place, taking it back, saving it, and what cannot be swapped."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from seqpar import comm, hf
from tests.hf import versions
from tests.hf.test_generate import NAME, generate
from tests.hf.tiny import prompts, tiny_config, tiny_model
from tests.ranks import run_mesh


def undoes(mesh: comm.DeviceMesh, kind: str) -> None:
    model = tiny_model(kind)
    ids = prompts(2, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, attributes = dict(model.named_modules()), set(model.__dict__)
    tokens, names = generate(model, input_ids=ids), set(vars(transformers.models.auto.modeling_auto))
    with hf.parallelize(model, mesh) as parallel:
        assert model.seqpar is parallel and type(model.model) is hf.ParallelBackbone
        with pytest.raises(ValueError, match="`model` must not be parallelized already, got one that is"):
            hf.parallelize(model, mesh)
        model(ids, labels=ids).loss.backward()
        parallel.sync_gradients()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert not torch.equal(generate(model, input_ids=ids), tokens)
        model.train()
    parallel.undo()
    assert all(module.training for module in model.modules())
    model.eval()
    assert dict(model.named_modules()) == modules and set(model.__dict__) == attributes
    assert not model._forward_pre_hooks and set(vars(transformers.models.auto.modeling_auto)) == names
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(generate(model, input_ids=ids), tokens)
    hf.parallelize(model, mesh)
    assert torch.equal(generate(model, input_ids=ids), tokens)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=NAME)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_undo_restores_the_model(kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, undoes, kind)


def is_freed(mesh: comm.DeviceMesh, how: str) -> None:
    """With the last reference to the model go its weights, sharded and whole, without the garbage collector."""
    model = hf.load("examples/tiny-llama", mesh) if how == "load" else tiny_model(how)
    kept = [weakref.ref(model), weakref.ref(next(model.parameters()))]
    parallel = model.seqpar if how == "load" else hf.parallelize(model, mesh)
    kept += [weakref.ref(model.lm_head), weakref.ref(next(model.model.layers[0].parameters()))]
    generate(model, input_ids=prompts(1, 4))
    if how != "load":
        model(prompts(1, 4), labels=prompts(1, 4)).loss.backward()
    gc.collect()  # what the forwards left behind
    gc.disable()
    try:
        del model
        assert kept[0]() is None
        with pytest.raises(ValueError, match="`model` must be kept in a variable while it is parallelized"):
            parallel.sync_gradients()
        del parallel  # held the modules for `undo`
        assert not any(each() is not None for each in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["load", "llama", "qwen2"])
def test_a_dropped_model_frees_its_weights_at_once(how: str) -> None:
    run_mesh((1, 2), is_freed, how)


def keeps(mesh: comm.DeviceMesh) -> None:
    """A `with` block keeps the model; methods look as before, and know when their model is gone."""
    model = tiny_model("llama")
    plain = inspect.signature(model.generate), inspect.signature(model.save_pretrained)
    with hf.parallelize(model, mesh) as parallel:
        assert (inspect.signature(model.generate), inspect.signature(model.save_pretrained)) == plain
        method, kept = model.generate, weakref.ref(model)
        del model
        generate(parallel.model, input_ids=prompts(1, 4))
        gc.collect()
        assert kept() is parallel.model
    assert kept() is None
    with pytest.raises(ValueError, match="`generate` must be called on a model that is kept in a variable"):
        method(prompts(1, 4))


def test_a_with_block_keeps_the_model() -> None:
    run_mesh((2, 1), keeps)


def saves(mesh: comm.DeviceMesh, path: str, kind: str) -> None:
    model = tiny_model(kind)
    ids = prompts(2, 6)
    hf.parallelize(model, mesh)
    model(ids, labels=ids).loss.backward()
    model.seqpar.sync_gradients()
    torch.optim.SGD(model.parameters(), 0.1).step()
    tokens = generate(model, input_ids=ids)
    model.save_pretrained(path, max_shard_size="20KB")
    for saved in (AutoModelForCausalLM.from_pretrained(path), hf.load(path, mesh)):
        assert torch.equal(generate(saved, input_ids=ids), tokens)
    with pytest.raises(TypeError, match="`save_pretrained` must get no state dict and no main process"):
        model.save_pretrained(path, state_dict={})


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_save_pretrained_writes_the_whole_model(tmp_path: Path, kind: str) -> None:
    run_mesh((2, 2), saves, str(tmp_path), kind)


def state_dicts(mesh: comm.DeviceMesh) -> None:
    """Names are the unsharded ones; a whole state dict can be loaded back."""
    model, other = tiny_model("qwen3"), tiny_model("qwen3", seed=2)
    whole = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    ids = prompts(2, 6)
    expected = other(ids).logits
    parallel = hf.parallelize(model, mesh)
    assert model.state_dict().keys() == whole.keys()
    model.load_state_dict(whole)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
    gathered = parallel.gather_state_dict()
    assert all(torch.equal(gathered[name], whole[name]) for name in whole)


def test_state_dicts() -> None:
    run_mesh((2, 1), state_dicts)


class Odd(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


def wrap(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = Odd(model.model.layers[1].self_attn.q_proj)


def hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def patch(model: Any) -> None:
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward


def spread(model: Any) -> None:
    model.hf_device_map = {"model": 0, "lm_head": 1}


def set_config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


UNFIT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a wrapped linear": (
        wrap,
        "`model.layers.1.self_attn.q_proj` must be unwrapped before the model is sliced, got Odd",
    ),
    "a hook": (hook, "`model.layers.1.mlp` must carry no hooks when it is swapped out, got <function"),
    "a replaced forward": (patch, "`model.layers.1.mlp` must carry no hooks when it is swapped out, got <bound method"),
    "two devices": (spread, "`model` must lie on one device, got {'model': 0, 'lm_head': 1}"),
    "checkpointing": (
        versions.enable_checkpointing,
        "gradient checkpointing must be off, got it on",
    ),
    "an activation": (set_config("hidden_act", "relu"), "`hidden_act` must be silu, got relu"),
    "a causality": (set_config("is_causal", False), "`is_causal` must be True, got False"),
    "a layer type": (
        set_config("layer_types", ["chunked_attention"] * 3),
        "`layer_types` must be full_attention, or sliding_attention with a `sliding_window`, got ['chunked_attention']",
    ),
    "no window": (set_config("layer_types", ["sliding_attention"] * 3), "got sliding_attention without one"),
}


def refuses(mesh: comm.DeviceMesh, name: str) -> None:
    change, message = UNFIT[name]
    model = tiny_model("qwen3")
    if comm.groups(mesh).flat.rank() == 1:
        change(model)
    with comm.record() as sent, pytest.raises(ValueError) as error:
        hf.parallelize(model, mesh)
    assert message in str(error.value), str(error.value)
    assert sent.by_label().keys() == {"agree"}, sent.table()
    assert not hasattr(model, "seqpar") and type(model.model).__name__ == "Qwen3Model"


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_is_unfit_on_one_rank(name: str) -> None:
    run_mesh((1, 2), refuses, name)


def refuses_others(mesh: comm.DeviceMesh) -> None:
    rank = comm.groups(mesh).flat.rank()
    with pytest.raises(TypeError, match=r"`model` must be one of LlamaForCausalLM, .*, got LlamaModel"):
        hf.parallelize(tiny_model("llama").model, mesh)

    class LlamaForCausalLM(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(TypeError, match="`model` must be Transformers' own LlamaForCausalLM, got tests"):
        hf.parallelize(LlamaForCausalLM(tiny_config("llama")), mesh)
    for other in ({"seed": rank}, {"sliding_window": 5 + rank}):
        with pytest.raises(ValueError, match="config and weights of `model` must be the same on every rank"):
            hf.parallelize(tiny_model("mistral", **other), mesh)
    with pytest.raises(ValueError, match=r"`num_heads` must be at least the number of ranks \(2\), got 1"):
        hf.parallelize(tiny_model("llama", num_attention_heads=1, num_key_value_heads=1), mesh)


def test_other_models_are_refused() -> None:
    run_mesh((2, 1), refuses_others)
