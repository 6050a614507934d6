"""`overlap="auto"`: what it measures, that it chooses by it, the same on every rank, and what it leaves alone."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.hf import AutoOverlap, load, parallelize
from seqpar.plan import Curve, LayerCosts, SlotCosts
from tests.hf.tiny import prompts, tiny_model
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned

TOKENS = 96


def made_up(compute: float, alpha: float, beta: float) -> LayerCosts:
    """Two slots of `compute` a token, and sums of alpha + beta a token."""
    sends = Curve.line(alpha, beta)
    return LayerCosts((SlotCosts(Curve.line(0.0, compute), sends), SlotCosts(Curve.line(0.0, compute), sends)))


def take_time(_: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Compute that is there on any machine: a fifth of a millisecond a row."""
    time.sleep(2e-4 * len(args[0]))


def chosen(
    mesh: comm.DeviceMesh, alpha_s: float, bytes_per_s: float, computes: bool
) -> tuple[tuple[int, ...], LayerCosts | None, str]:
    """The cuts of a prompt after measuring on a link; its tokens are compared with Transformers' on the way."""
    model, oracle = tiny_model("llama"), tiny_model("llama")
    ids = prompts(2, TOKENS // 2)
    expected = oracle.generate(ids, max_new_tokens=4, do_sample=False)
    groups = comm.groups(mesh)
    link = comm.SimulatedLink(alpha_s, bytes_per_s)
    auto = AutoOverlap(min_tokens=TOKENS)
    with parallelize(model, mesh, overlap=auto) as parallel, link.on(groups.tp), link.on(groups.sp):
        for layer in model.model.layers if computes else ():
            layer.input_layernorm.register_forward_pre_hook(take_time)
            layer.post_attention_layernorm.register_forward_pre_hook(take_time)
        assert parallel.explain_overlap().startswith(f"undecided: no step of at least {TOKENS} tokens")
        with comm.record() as sent:
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        assert not any(label == "calibrate" for _, label in sent.counts)
        assert auto.latest is not None and auto.latest.num_tokens == TOKENS
        assert auto.latest.last_rows == (None if computes else 2)  # a hook on the last layer wants to see all rows
        return auto.latest.cuts, auto.costs[None], parallel.explain_overlap()


@pytest.mark.parametrize("layout", thinned([(2, 1), (1, 2)], (2, 1).__eq__), ids=str)
def test_latency_is_not_hidden_and_bytes_are(layout: tuple[int, int]) -> None:
    """Chunks would pay the first link's latency again each; the second carries two halves as fast as the whole."""
    for cuts, costs, why in (found := tries(layout, False, 0.02, math.inf, False)):
        assert cuts == (), why
        assert (cuts, costs, why) == found[0]
        assert "run whole" in why and "simulated link" in why
    for cuts, costs, why in (found := tries(layout, True, 1e-5, 2e6 / layout[1], True)):
        assert cuts, why
        assert (cuts, costs, why) == found[0]
        assert f"{len(cuts) + 1} chunks, cut at" in why and "<- chosen" in why


def tries(layout: tuple[int, int], cut: bool, *link: Any) -> list[Any]:
    """What the ranks choose, up to three times until it is what is expected: a busy machine may measure wrongly."""
    found: list[Any] = []
    for _ in range(3):
        found = run_mesh(layout, chosen, *link)
        if bool(found[0][0]) == cut:
            break
    return found


def skewed(mesh: comm.DeviceMesh) -> tuple[Any, ...]:
    """Rank 1 computes slower than rank 0; what they measure differs, what they decide does not."""
    model = tiny_model("llama")
    auto = AutoOverlap(min_tokens=8)
    with parallelize(model, mesh, overlap=auto), torch.no_grad():
        if comm.groups(mesh).flat.rank() == 1:
            for layer in model.model.layers:
                layer.input_layernorm.register_forward_pre_hook(lambda *_: time.sleep(0.005))
        for length in (12, 60, 13):
            model(prompts(1, length))
        return auto.costs[None], auto.latest


def test_ranks_agree_though_their_measurements_differ() -> None:
    results = run_mesh((2, 1), skewed)
    assert results[0] == results[1]
    assert results[0][1].num_tokens == 13


def steps_taken(mesh: comm.DeviceMesh) -> None:
    """Given costs: nothing is measured; decodes, small steps, steps with gradients or hooks are not decided upon."""
    model, ids = tiny_model("llama"), prompts(3, 8)
    auto = AutoOverlap(min_tokens=3, costs=made_up(1e-4, 1e-6, 1e-4))

    def layer_calls(*args: Any, **kwargs: Any) -> int:
        with comm.record() as sent:
            model(*args, **kwargs)
        return sum(count.calls for (_, label), count in sent.counts.items() if ".layers." in label)

    with parallelize(model, mesh, overlap=auto) as parallel:
        model(ids, labels=ids).loss.backward()
        assert auto.latest is None
        with torch.no_grad():
            out = model(ids, use_cache=True)
            assert auto.latest is not None and auto.latest.cuts
            latest = auto.latest
            assert layer_calls(ids) == 6 * latest.chunks
            assert layer_calls(ids[:, :1], past_key_values=out.past_key_values) == 6
            assert auto.latest is latest  # a decode is nothing to decide upon
            hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
            assert layer_calls(ids) == 6
            assert "`layers.1.mlp.down_proj` has hooks or a wrapper" in parallel.explain_overlap()
            hook.remove()
            model(ids[:, :5], past_key_values=out.past_key_values)
            assert auto.latest is not latest  # longer prefix, another question


def test_only_prompts_are_decided_upon() -> None:
    run_mesh((2, 1), steps_taken)


def by_name(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("qwen2")
    with parallelize(model, mesh, overlap="auto") as parallel:
        assert isinstance(model.model.overlap, AutoOverlap)
        assert "no step of at least 512 tokens" in parallel.explain_overlap()
    with parallelize(model, mesh) as parallel:
        assert parallel.explain_overlap() == "off: every step runs whole"
    with own_errors(), pytest.raises(ValueError, match="`min_tokens` and `chunks` must be at least 2, got 1 and"):
        AutoOverlap(min_tokens=1)
    loaded = load(Path("examples/tiny-llama"), mesh, overlap="auto", progress=False)
    assert isinstance(loaded.model.overlap, AutoOverlap)


def test_auto_by_name() -> None:
    run_mesh((2, 1), by_name)
