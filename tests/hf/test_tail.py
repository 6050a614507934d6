"""The last layer under Hugging Face's forward: rows that nobody asked for are cached and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.hf import parallelize
from seqpar.hf.cache import store_of
from seqpar.partition import Interleave, ThreePhase
from tests.hf.tiny import ARCHITECTURES, exact_norms, left_padded, prompts, tiny_model
from tests.layers.reference import name_of, written_rows
from tests.ranks import run_mesh, thinned

KEEPS = [1, 3, torch.tensor([7, 2]), torch.tensor([0])]


def inputs(side: str) -> dict[str, Tensor]:
    """Three prompts of 9, 6 and 4 tokens in 9 columns."""
    ids, mask = left_padded(prompts(3, 9), (0, 3, 5))
    return {"input_ids": ids, "attention_mask": mask if side == "left" else mask.flip(1)}


def cached(output: Any) -> list[Tensor]:
    """Keys and values of every token that the cache holds, layer after layer."""
    kv = store_of(output.past_key_values, 3).kv
    at = written_rows(kv)
    return [pages.flatten(0, 1)[at] for layer in range(3) for pages in kv.layer(layer)]


def same(mesh: comm.DeviceMesh, kind: str, overlap: Any) -> None:
    """Logits of the rows asked for are the reference's, and the cache is bit for bit that of all rows."""
    model, oracle = tiny_model(kind), exact_norms(tiny_model(kind))
    with parallelize(model, mesh, overlap=overlap), torch.no_grad():
        for side in ("left", "right"):
            given = inputs(side)
            real = given["attention_mask"].bool()
            expected, everything = oracle(**given).logits, model(**given, use_cache=True)
            for keep in KEEPS:
                out = model(**given, logits_to_keep=keep, use_cache=True)
                columns = slice(-keep, None) if isinstance(keep, int) else keep
                seen = real[:, columns]
                torch.testing.assert_close(out.logits[seen], expected[:, columns][seen], rtol=1e-9, atol=1e-9)
                for ours, theirs in zip(cached(out), cached(everything), strict=True):
                    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", thinned([(1, 2), (2, 1), (1, 3), (2, 2)], ((2, 2),).__contains__), ids=name_of)
def test_logits_and_cache(layout: tuple[int, int]) -> None:
    for overlap in ("off", Interleave(3, min_tokens=4), Interleave(cuts=(1, 10, 15), min_tokens=19)):
        run_mesh(layout, same, ARCHITECTURES[sum(layout) % 4], overlap)
    run_mesh(layout, same, ARCHITECTURES[sum(layout) % 4 - 1], Interleave(2, min_tokens=4))


def bytes_of_layers(sent: comm.Recorder) -> list[int]:
    """What each of the three layers sent."""
    return [
        sum(count.num_bytes for (_, label), count in sent.counts.items() if f".layers.{index}." in label)
        for index in range(3)
    ]


def watched(mesh: comm.DeviceMesh) -> None:
    """Whoever listens to the last layer, or to the norm after it, sees all rows; nobody, the one in the last column."""
    model, given = tiny_model("llama"), inputs("right")
    with parallelize(model, mesh), torch.no_grad():
        last, norm = model.model.layers[-1], model.model.norm
        plain = model(**given, logits_to_keep=1).logits
        for part in (last, last.self_attn, last.mlp.down_proj, last.post_attention_layernorm, norm):
            shapes: list[int] = []
            hook = part.register_forward_hook(lambda _, __, out, shapes=shapes: shapes.append(len(out)))
            torch.testing.assert_close(model(**given, logits_to_keep=1).logits, plain, rtol=1e-12, atol=1e-12)
            hook.remove()
            assert shapes == [19]
        if comm.groups(mesh).flat.rank() == 1:  # on one rank alone: all compute all
            hook = last.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(**given, logits_to_keep=1).logits, plain, rtol=1e-12, atol=1e-12)
        hook.remove()
        for options, whole in (
            ({"logits_to_keep": 1}, False),
            ({}, True),
            ({"logits_to_keep": 1, "output_hidden_states": True}, True),
            ({"labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}, True),
        ):
            with comm.record() as sent:
                model(**given, **options)
            first, second, third = bytes_of_layers(sent)
            assert first == second == (third if whole else 19 * third), sent.table()


def test_hooks_hidden_states_and_losses_see_every_row() -> None:
    run_mesh((2, 1), watched)


def sharded(mesh: comm.DeviceMesh, overlap: Any) -> None:
    """Activations sequence-sharded over tp: rows stay with the ranks that hold them, and all come out in order."""
    model, oracle = tiny_model("qwen3"), exact_norms(tiny_model("qwen3"))
    with parallelize(model, mesh, sequence_sharded=True, overlap=overlap), torch.no_grad():
        for side in ("left", "right"):
            given = inputs(side)
            for keep in (1, torch.tensor([7, 2])):
                with comm.record() as sent:
                    out = model(**given, logits_to_keep=keep)
                seen = given["attention_mask"].bool()[:, slice(-keep, None) if isinstance(keep, int) else keep]
                expected = oracle(**given, logits_to_keep=keep).logits
                torch.testing.assert_close(out.logits[seen], expected[seen], rtol=1e-9, atol=1e-9)
        first, second, third = bytes_of_layers(sent)
        assert third < second == first or overlap != "off"


@pytest.mark.parametrize("layout", [(2, 1), (3, 1), (2, 2)], ids=name_of)
def test_sequence_sharded_activations(layout: tuple[int, int]) -> None:
    run_mesh(layout, sharded, "off")
    run_mesh(layout, sharded, Interleave(3, min_tokens=4))


def pipelined(mesh: comm.DeviceMesh) -> None:
    """A three-phase pipeline cuts all layers but the last, which has few queries left to cut."""
    model, oracle, given = tiny_model("llama"), exact_norms(tiny_model("llama")), inputs("left")
    with parallelize(model, mesh, pipeline=ThreePhase(1, 2, min_tokens=4)), torch.no_grad(), comm.record() as sent:
        out = model(**given, logits_to_keep=1).logits
        torch.testing.assert_close(out, oracle(**given, logits_to_keep=1).logits, rtol=1e-9, atol=1e-9)
    calls = [sent.counts["all_to_all", f"model.layers.{index}.self_attn.core"].calls for index in range(3)]
    assert calls == [6, 6, 2]  # k, v, two of q and two back; one there and one back


def test_a_pipeline_leaves_the_last_layer_alone() -> None:
    run_mesh((1, 2), pipelined)


def nothing_asked_for(mesh: comm.DeviceMesh, overlap: Any) -> None:
    """The only column asked for is padding of every request: zeros, and a cache to go on from."""
    model, oracle = tiny_model("llama"), exact_norms(tiny_model("llama"))
    ids, mask = left_padded(prompts(2, 6), (2, 1))
    with parallelize(model, mesh, overlap=overlap), torch.no_grad():
        out = model(ids, attention_mask=mask, logits_to_keep=torch.tensor([0]), use_cache=True)
        assert out.logits.shape == (2, 1, 67) and not out.logits.any()
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        found = model(ids[:, -1:], attention_mask=longer, past_key_values=out.past_key_values).logits
        expected = oracle(torch.cat([ids, ids[:, -1:]], 1), attention_mask=longer, logits_to_keep=1).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_a_step_that_nobody_asks_rows_of(layout: tuple[int, int]) -> None:
    run_mesh(layout, nothing_asked_for, "off")
    run_mesh(layout, nothing_asked_for, Interleave(2, min_tokens=4))


def gradients(mesh: comm.DeviceMesh) -> None:
    """A loss over the last logits alone: the gradient of every weight is that of the whole run cut afterwards."""
    model, given = tiny_model("llama"), inputs("left")
    parallel = parallelize(model, mesh)
    grads = []
    for options in ({"logits_to_keep": 1}, {}):
        model.zero_grad()
        model(**given, **options).logits[:, -1].square().sum().backward()
        parallel.sync_gradients()
        grads.append([param.grad for param in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("layout", [(2, 1), (1, 3), (2, 2)], ids=name_of)
def test_gradients_of_the_last_logits(layout: tuple[int, int]) -> None:
    run_mesh(layout, gradients)
