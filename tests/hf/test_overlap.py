"""ISO under Hugging Face's own forward and `generate`: chunks take turns, and nothing changes but the order of work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from seqpar import comm, kernels
from seqpar.hf import ParallelCache, parallelize
from seqpar.partition import Interleave
from tests.hf.tiny import ARCHITECTURES, exact_norms, prompts, tiny_model
from tests.kernels.own_errors import own_errors
from tests.layers.reference import name_of
from tests.ranks import run_mesh, thinned


def padded() -> dict[str, torch.Tensor]:
    """Two prompts, the second left-padded: 11 and 7 tokens."""
    torch.manual_seed(2)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": torch.randint(1, 67, (2, 11)), "attention_mask": mask}


def same(mesh: comm.DeviceMesh, kind: str, overlap: Interleave, sequence_sharded: bool) -> None:
    model, oracle, inputs = tiny_model(kind), exact_norms(tiny_model(kind)), padded()
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = oracle(**inputs, output_hidden_states=True)
    tokens = oracle.generate(**inputs, max_new_tokens=6, do_sample=False)
    with parallelize(model, mesh, overlap=overlap, sequence_sharded=sequence_sharded), torch.no_grad():
        for use_cache in (True, False):
            out = model(**inputs, output_hidden_states=True, use_cache=use_cache)
            torch.testing.assert_close(out.logits[keep], expected.logits[keep], rtol=1e-9, atol=1e-10)
            for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-9, atol=1e-10)
        few = model(**inputs, logits_to_keep=torch.tensor([10, 3, 9]))
        seen = keep[:, [10, 3, 9]]
        torch.testing.assert_close(few.logits[seen], expected.logits[:, [10, 3, 9]][seen], rtol=1e-9, atol=1e-10)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("kind", thinned(ARCHITECTURES, ("llama", "qwen3").__contains__))
@pytest.mark.parametrize(
    "layout", thinned([(1, 1), (2, 1), (1, 2), (2, 2)], ((2, 1), (2, 2)).__contains__), ids=name_of
)
def test_chunks_give_what_the_whole_gives(kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, same, kind, Interleave(2, min_tokens=4), False)
    run_mesh(layout, same, kind, Interleave(cuts=(1, 5, 16), min_tokens=18), layout[0] > 1)


def calls(mesh: comm.DeviceMesh, overlap: Any, keep: int) -> tuple[int, int]:
    """Collectives of the layers in a prefill of 12 tokens, `keep` of them asked for (0: all), and in a decode."""
    model = tiny_model("llama")
    ids = torch.arange(12)[None]
    with parallelize(model, mesh, overlap=overlap), torch.no_grad():
        with comm.record() as prefill:
            out = model(ids, use_cache=True, logits_to_keep=keep)
        with comm.record() as decode:
            model(ids[:, -1:], past_key_values=out.past_key_values)
    counts = [
        sum(count.calls for (_, label), count in sent.counts.items() if ".layers." in label)
        for sent in (prefill, decode)
    ]
    return counts[0], counts[1]


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=name_of)
def test_as_many_chunks_run_as_were_asked_for(layout: tuple[int, int]) -> None:
    """Three layers of two collectives, once for each chunk; a decode is below the gate.

    Where the last row alone is asked for, the other chunks end with their append to the last layer's cache: without
    its two all-reduces, or without its second all-to-all.
    """
    ended = 2 if layout == (2, 1) else 1
    assert run_mesh(layout, calls, "off", 1)[0] == (6, 6)
    assert run_mesh(layout, calls, Interleave(2, min_tokens=12), 0)[0] == (12, 6)
    assert run_mesh(layout, calls, Interleave(3, min_tokens=12), 0)[0] == (18, 6)
    assert run_mesh(layout, calls, Interleave(2, min_tokens=12), 1)[0] == (12 - ended, 6)
    assert run_mesh(layout, calls, Interleave(3, min_tokens=12), 1)[0] == (18 - 2 * ended, 6)
    assert run_mesh(layout, calls, Interleave(3, min_tokens=12), 5)[0] == (18 - ended, 6)
    assert run_mesh(layout, calls, Interleave(3, min_tokens=13), 1)[0] == (6, 6)


def edges(mesh: comm.DeviceMesh) -> None:
    """Cuts at the ends of requests, next to them and inside; a row that is padding only; chunks of one token each."""
    model, oracle, inputs = tiny_model("qwen3"), exact_norms(tiny_model("qwen3")), padded()
    inputs = {name: torch.cat([x[:1], torch.zeros_like(x[:1]), x[1:]]) for name, x in inputs.items()}
    keep = inputs["attention_mask"].bool()
    per_chunk = 2 * sum(size > 1 for size in comm.groups(mesh).layout)
    with torch.no_grad():
        expected = oracle(**inputs).logits[keep]
    for cuts in ((11,), (10,), (12,), (17,), (1,), (10, 11, 12), (11, 15), tuple(range(1, 18))):
        with parallelize(model, mesh, overlap=Interleave(cuts=cuts, min_tokens=18)), torch.no_grad():
            with comm.record() as sent:
                found = model(**inputs).logits
            torch.testing.assert_close(found[keep], expected, rtol=1e-9, atol=1e-10)
            assert not found[~keep].any()
            calls = sum(count.calls for (_, label), count in sent.counts.items() if ".layers." in label)
            assert calls == 3 * per_chunk * (len(cuts) + 1)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_cuts_may_fall_anywhere(layout: tuple[int, int]) -> None:
    run_mesh(layout, edges)


def call_by_call(mesh: comm.DeviceMesh, kind: str, dtype: torch.dtype) -> None:
    """One forward of interleaved chunks is, bit for bit, the forwards of its chunks one after another."""
    model, ids, cuts = tiny_model(kind, dtype=dtype), prompts(1, 23), (7, 8, 16)
    with parallelize(model, mesh, overlap=Interleave(cuts=cuts, min_tokens=23)), torch.no_grad():
        at_once = model.model(ids, use_cache=True)  # the head is one product, of all rows that are asked for
        cache, states = None, []
        for a, b in pairwise((0, *cuts, 23)):
            out = model.model(ids[:, a:b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            states.append(out.last_hidden_state)
        assert torch.equal(at_once.last_hidden_state, torch.cat(states, 1))
        again = [model(ids[:, :1], past_key_values=each).logits for each in (at_once.past_key_values, cache)]
        assert torch.equal(*again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_chunks_by_turns_are_calls_one_after_another(layout: tuple[int, int], dtype: torch.dtype) -> None:
    run_mesh(layout, call_by_call, "llama" if dtype == torch.float32 else "mistral", dtype)


def uncut(mesh: comm.DeviceMesh, dtype: torch.dtype) -> bool:
    """Whether products of these shapes are row-invariant; then cut prompts have the logits and tokens of whole ones."""
    model, ids = tiny_model("llama", dtype=dtype, max_position_embeddings=256), prompts(1, 180)
    groups, found = comm.groups(mesh), []
    for overlap in ("off", Interleave(cuts=(64, 128), min_tokens=180)):
        with parallelize(model, mesh, overlap=overlap), torch.no_grad():
            logits = model(ids).logits
            found.append((logits, model.generate(ids, max_new_tokens=8, do_sample=False)))
            weights = [param for layer in model.model.layers for param in layer.parameters() if param.dim() == 2]
    exact = all(kernels.is_row_invariant(weight, 180, (64, 128), sp=groups.sp.size()) for weight in weights)
    if comm.all_reduce(torch.tensor(int(exact)), group=groups.flat) < groups.flat.size():
        return False
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=name_of)
def test_cut_prompts_are_whole_ones_bit_for_bit_on_a_deterministic_mesh(
    layout: tuple[int, int], dtype: torch.dtype
) -> None:
    if not all(run_mesh(layout, uncut, dtype, deterministic=True)):
        pytest.skip("this machine's products of these sizes depend on the number of rows")


def trained(mesh: comm.DeviceMesh) -> None:
    """With gradients a step runs as it is: they do not flow through the cache that chunks share."""
    model, ids = tiny_model("llama"), torch.arange(12)[None]
    with parallelize(model, mesh, overlap=Interleave(2, min_tokens=4)):
        model(ids, labels=ids).loss.backward()
        assert all(param.grad is not None for param in model.model.layers.parameters())


def test_steps_with_gradients_are_not_cut() -> None:
    run_mesh((2, 1), trained)


def other_sizes(mesh: comm.DeviceMesh) -> None:
    """Cuts in `generate`: a prefill that they do not fit is refused before anything is sent or kept; others run."""
    model, oracle = tiny_model("llama"), tiny_model("llama")
    options = {"max_new_tokens": 5, "do_sample": False}
    with parallelize(model, mesh, overlap=Interleave(cuts=(9, 14), min_tokens=2)) as parallel:
        for ids in (prompts(1, 14), prompts(2, 5), prompts(1, 9)):
            refused = pytest.raises(ValueError, match=rf"within the step's {ids.numel()} tokens, got \[9, 14\]; give")
            cache = ParallelCache()
            with refused, comm.record() as sent:
                model.generate(ids, past_key_values=cache, **options)
            assert not any(label.startswith("model") for _, label in sent.counts), sent.table()
            assert cache.get_seq_length() == 0
        for ids in (prompts(1, 15), prompts(3, 9)):  # three requests decode above the gate, and yet whole
            assert torch.equal(model.generate(ids, **options), oracle.generate(ids, **options))
        with comm.record() as sent:
            model.generate(prompts(3, 9), **options)
        calls = sum(count.calls for (_, label), count in sent.counts.items() if ".layers." in label)
        ended = 2 if parallel.groups.layout.tp > 1 else 1  # by the second chunk, whose rows nobody asks for
        assert calls == 3 * 6 - ended + 4 * 6


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=name_of)
def test_cuts_that_do_not_fit_a_prefill(layout: tuple[int, int]) -> None:
    run_mesh(layout, other_sizes)


def refusals(mesh: comm.DeviceMesh) -> None:
    model, ids = tiny_model("llama"), torch.arange(12)[None]
    with (
        own_errors(),
        pytest.raises(TypeError, match='`overlap` must be an Interleave, an AutoOverlap, "auto" or "off", got 2'),
    ):
        parallelize(model, mesh, overlap=2)
    with parallelize(model, mesh, overlap=Interleave(2, min_tokens=4)), torch.no_grad():
        rank = comm.groups(mesh).flat.rank()  # on one rank alone: all refuse
        hook = model.model.layers[rank].mlp.down_proj.register_forward_hook(lambda *_: None)
        if rank == 0:
            hook.remove()
        refused = pytest.raises(ValueError, match=r'`overlap` must be "off".*on `layers.1.mlp.down_proj`; remove them')
        with comm.record() as sent, refused:
            model(ids)
        assert {label for _, label in sent.counts} == {"agree"}, sent.table()
        hook.remove()
        model(ids)
    late = parallelize(model, mesh, overlap=Interleave(cuts=(12,), min_tokens=4))
    with late, pytest.raises(ValueError, match=r"`cuts` must lie within the step's 12 tokens, got \[12\]"):
        model.generate(ids, max_new_tokens=1)


def test_what_cannot_be_cut_is_refused() -> None:
    run_mesh((2, 1), refusals)
