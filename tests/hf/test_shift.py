"""Shift under Hugging Face's own forward and `generate`: every step its layout, one cache, one copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.hf import AutoOverlap, AutoShift, load, parallelize
from seqpar.partition import Interleave, Layout, Shift
from seqpar.plan import Curve, StepCosts
from tests.hf.tiny import ARCHITECTURES, exact_norms, tiny_model
from tests.kernels.own_errors import own_errors
from tests.layers.reference import name_of
from tests.ranks import run_mesh, thinned


def padded() -> dict[str, torch.Tensor]:
    """Two prompts, the second left-padded: 11 and 7 tokens."""
    torch.manual_seed(2)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": torch.randint(1, 67, (2, 11)), "attention_mask": mask}


def same(mesh: comm.DeviceMesh, kind: str, spans: dict[int, tuple[int, int]], options: dict[str, Any]) -> None:
    """A prefill of 18 tokens, decodes of 2, and a forward of one request of 5 without a cache."""
    model, oracle, inputs = tiny_model(kind), exact_norms(tiny_model(kind)), padded()
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = oracle(**inputs, output_hidden_states=True)
        short = oracle(inputs["input_ids"][:1, :5]).logits
    tokens = oracle.generate(**inputs, max_new_tokens=6, do_sample=False)
    shift = Shift(tuple((first, Layout(*layout)) for first, layout in spans.items()))
    with parallelize(model, mesh, shift=shift, **options) as parallel, torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(out.logits[keep], expected.logits[keep], rtol=1e-9, atol=1e-10)
        for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(model(inputs["input_ids"][:1, :5]).logits, short, rtol=1e-9, atol=1e-10)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
        report = parallel.memory()
        assert report.extra_bytes == 0
        used = [report.layout_bytes[layout] for layout in sorted(report.layout_bytes)]
        assert used[0] == report.weight_bytes and used == sorted(used, reverse=True)


@pytest.mark.parametrize("kind", thinned(ARCHITECTURES, ("llama", "qwen3").__contains__))
def test_prefill_in_one_layout_and_decodes_in_another_give_what_the_model_gives(kind: str) -> None:
    run_mesh((1, 4), same, kind, {1: (4, 1), 3: (2, 2), 12: (1, 4)}, {})
    run_mesh((2, 2), same, kind, {1: (2, 2), 4: (4, 1)}, {"sequence_sharded": True})


def test_chunks_take_turns_within_any_layout() -> None:
    run_mesh((1, 4), same, "llama", {1: (4, 1), 12: (2, 2)}, {"overlap": Interleave(2, min_tokens=12)})
    run_mesh((1, 2), same, "qwen3", {1: (1, 2), 12: (2, 1)}, {"overlap": Interleave(cuts=(1, 7), min_tokens=12)})


def overlapped(mesh: comm.DeviceMesh) -> None:
    """Costs of both layouts are measured, each when a step first runs under it, and explain the latest."""
    auto = AutoOverlap(min_tokens=4)
    model, oracle = tiny_model("llama"), exact_norms(tiny_model("llama"))
    with parallelize(model, mesh, shift=6, overlap=auto), torch.no_grad():
        for tokens in (11, 5):  # the smaller one knows nothing of its layout, though the other was measured further
            ids = torch.arange(tokens)[None]
            torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=1e-9, atol=1e-10)
    assert set(auto.costs) == {None, Layout(2, 1)}
    assert len(auto.costs[None].slots) == len(auto.costs[Layout(2, 1)].slots) == 3  # two collectives and a rest


def test_overlap_knows_what_each_layout_costs() -> None:
    run_mesh((1, 2), overlapped)


def on_the_wire(mesh: comm.DeviceMesh) -> None:
    """In 8 bits a step gives what it gives under that layout alone."""
    inputs, results = padded(), []
    keep = inputs["attention_mask"].bool()
    for shift in (Shift(((1, Layout(2, 2)),)), Shift(((1, Layout(1, 4)), (4, Layout(2, 2))))):
        model = tiny_model("qwen3").float()
        with parallelize(model, mesh, shift=shift, wire="int8"), torch.no_grad():
            results.append(model(**inputs).logits[keep])
    assert torch.equal(*results)
    assert not torch.equal(results[0], tiny_model("qwen3").float()(**inputs).logits[keep])


def test_wire_formats_are_the_same_in_any_layout() -> None:
    run_mesh((1, 4), on_the_wire)


def searched(mesh: comm.DeviceMesh) -> None:
    """Beams move between requests of the cache while layouts change under them; sampling draws the same everywhere."""
    inputs, model = padded(), tiny_model("qwen2")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = tiny_model("qwen2").generate(**inputs, **options)
    with parallelize(model, mesh, shift=Shift(((1, Layout(2, 1)), (7, Layout(1, 2))))):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_beam_search() -> None:
    run_mesh((1, 2), searched)


def calls(mesh: comm.DeviceMesh, shift: Any) -> list[dict[str, int]]:
    """Collectives of the layers, by their name, in a prefill of 12 tokens and in a decode."""
    model = tiny_model("qwen3")
    ids = torch.arange(12)[None]
    found = []
    with parallelize(model, mesh, shift=shift), torch.no_grad():
        cache = None
        for step in (ids, ids[:, -1:]):
            with comm.record() as sent:
                cache = model(step, past_key_values=cache, use_cache=True).past_key_values
            names: dict[str, int] = {}
            for (op, label), count in sent.counts.items():
                if ".layers." in label:
                    names[op] = names.get(op, 0) + count.calls
            found.append(names)
    return found


def test_a_threshold_is_the_papers_rule() -> None:
    """Ulysses above it, tensor parallelism up to it: told apart by what travels."""
    ulysses, tensor = run_mesh((1, 2), calls, 11)[0]
    assert set(ulysses) == {"all_to_all"} and "all_to_all" not in tensor
    assert run_mesh((1, 2), calls, 12)[0] == [tensor, tensor]
    assert run_mesh((1, 2), calls, "off")[0] == [ulysses, ulysses]


def gradients(mesh: comm.DeviceMesh) -> None:
    """Steps with gradients run under the stored layout, whatever the rule says."""
    model, oracle = tiny_model("qwen3"), exact_norms(tiny_model("qwen3"))
    ids = torch.arange(9)[None]
    oracle(ids, labels=ids).loss.backward()
    parallel = parallelize(model, mesh, shift=100)
    model(ids, labels=ids).loss.backward()
    parallel.sync_gradients()
    norm = oracle.model.norm.weight.grad
    torch.testing.assert_close(model.model.norm.weight.grad, norm, rtol=1e-8, atol=1e-10)


def test_gradients_are_the_stored_layouts() -> None:
    run_mesh((1, 2), gradients)


def costs_of(crossing: int) -> StepCosts:
    """Pure tensor parallelism is the faster one below some number of tokens."""
    tensor, ulysses = Curve.line(1e-3, 2e-5), Curve.line(1e-3 + crossing * 1e-5, 1e-5)
    return StepCosts({Layout(2, 1): tensor, Layout(1, 2): ulysses}, source="made up", resolution=0.0)


def decided(mesh: comm.DeviceMesh, file: str | None) -> tuple[list[tuple[int, int]], str]:
    auto = AutoShift(file=file, tokens=(1, 4, 16)) if file else AutoShift(costs=costs_of(10))
    model, oracle = tiny_model("llama"), tiny_model("llama")
    inputs = padded()
    with parallelize(model, mesh, shift=auto) as parallel:
        assert "undecided" in parallel.explain_shift() or file is None
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, oracle.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert auto.choice is not None
        return [tuple(auto.choice.layout_of(n)) for n in (1, 9, 12, 100)], parallel.explain_shift()


def test_given_costs_decide() -> None:
    for layouts, _ in run_mesh((1, 2), decided, None):
        assert layouts == [(2, 1), (2, 1), (1, 2), (1, 2)]


def test_measured_costs_are_kept_and_read_again(tmp_path: Path) -> None:
    """The second run decides by the file alone, which by then says something else."""
    file = tmp_path / "costs.json"
    first = run_mesh((1, 2), decided, str(file))
    assert first[0] == first[1]
    assert sorted(StepCosts.load(file).curves) == [(1, 2), (2, 1)]
    assert "measured on 2 rank(s) of cpu" in first[0][1]
    costs_of(10).save(file)
    for layouts, explained in run_mesh((1, 2), decided, str(file)):
        assert layouts == [(2, 1), (2, 1), (1, 2), (1, 2)] and "made up" in explained


def hooked(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    with parallelize(model, mesh, shift="auto") as parallel, torch.no_grad():
        if comm.groups(mesh).flat.rank() == 1:
            model.model.layers[1].register_forward_hook(lambda *args: None)
        with comm.record() as sent:
            model(torch.arange(4)[None])
        assert {op for (op, label), _ in sent.counts.items() if ".layers." in label} == {"all_to_all"}
        assert "`layers.1` has hooks or a wrapper" in parallel.explain_shift()


def test_nothing_is_measured_while_a_layer_has_hooks() -> None:
    run_mesh((1, 2), hooked)


def refused(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    with own_errors():
        with pytest.raises(TypeError, match='`shift` must be a number of tokens, a Shift, an AutoShift, "auto" or'):
            parallelize(model, mesh, shift="always")
        with pytest.raises(
            ValueError, match=r"reachable from the stored \(2, 1\), got \(1, 2\); reachable are \(2, 1\)"
        ):
            parallelize(model, mesh, shift=Shift(((1, Layout(1, 2)),)))
        with pytest.raises(ValueError, match="`costs` must be given alone or left out for those of `file`, got both"):
            AutoShift(costs=costs_of(3), file="x")
        with pytest.raises(ValueError, match=r"`tokens` must be at least 1 and increasing, got \[4, 1\]"):
            AutoShift(tokens=(4, 1))
        rank = comm.groups(mesh).flat.rank()
        with pytest.raises(ValueError, match="must be the same on every rank, got another than rank 0's on rank 1"):
            parallelize(model, mesh, shift=4 + rank)


def test_rules_that_cannot_be_are_refused_on_every_rank() -> None:
    run_mesh((2, 1), refused)


def misread(mesh: comm.DeviceMesh, file: str) -> None:
    model = tiny_model("llama")
    auto = AutoShift(file=file)
    message = (
        "`path` must hold step costs as `save` writes them" if "bad" in file else r"`costs` must be of the layouts"
    )
    with own_errors(), parallelize(model, mesh, shift=auto), torch.no_grad(), pytest.raises(ValueError, match=message):
        model(torch.arange(3)[None])


def test_a_file_of_something_else_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    run_mesh((1, 2), misread, str(tmp_path / "bad.json"))
    StepCosts({Layout(4, 1): Curve.line(1e-3, 2e-5), Layout(2, 2): Curve.line(1e-3, 2e-5)}).save(tmp_path / "four.json")
    run_mesh((1, 2), misread, str(tmp_path / "four.json"))


def loaded(mesh: comm.DeviceMesh, folder: str) -> None:
    model = load(folder, mesh, shift=3)
    oracle = tiny_model("mistral")
    ids = torch.arange(7)[None]
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, oracle.generate(ids, max_new_tokens=5, do_sample=False))
    assert model.seqpar.explain_shift() == "as given: from 1 token(s): (2, 1), from 4 token(s): (1, 2)"
    assert model.seqpar.memory().extra_bytes == 0


def test_a_checkpoint_is_read_once_for_all_layouts(tmp_path: Path) -> None:
    tiny_model("mistral").save_pretrained(tmp_path)
    run_mesh((1, 2), loaded, str(tmp_path))


@pytest.mark.parametrize("layout", thinned([(1, 2), (2, 2)], (1, 2).__eq__), ids=name_of)
def test_auto_measures_what_the_mesh_reaches(layout: tuple[int, int]) -> None:
    run_mesh(layout, measured)


def measured(mesh: comm.DeviceMesh) -> None:
    auto = AutoShift(tokens=(1, 4))
    model = tiny_model("qwen2")
    with parallelize(model, mesh, shift=auto), torch.no_grad():
        model(torch.arange(6)[None])
    assert auto.choice is not None
    assert sorted(auto.choice.costs.curves) == sorted(comm.groups(mesh).layout.reachable)
