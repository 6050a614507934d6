"""`prefill=` and `decode=`: any pair gives the tokens of the unswapped model, and moves a cache once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from seqpar import comm, hf
from seqpar.hf.attend import Attend, rope_of
from seqpar.hf.attend import Path as Way
from seqpar.hf.cache import store_of
from seqpar.kernels import RopeConfig, rope_table
from seqpar.kv import StripedKV
from seqpar.layers import Certified, Strided, TopMass
from seqpar.partition import HeadMap, Interleave, Layout, Shift, ThreePhase
from seqpar.plan import Curve, DecodeCosts, MethodCosts
from tests.hf.test_forward import EXACT, cross_entropy
from tests.hf.tiny import ARCHITECTURES, MIXTURES, exact_norms, left_padded, prompts, tiny_model
from tests.kernels.own_errors import own_errors
from tests.layers.reference import name_of
from tests.ranks import SMALL, run_mesh, thinned

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-llama"
PAIRS = tuple(product(("ulysses", "ring"), ("local", "qship")))
PAIR = "{0[0]}-{0[1]}".format


def conversation(model: Any) -> list[torch.Tensor]:
    """A left-padded batch, and its continuation by a second prompt: greedy tokens of both."""
    ids, mask = left_padded(prompts(2, 23, vocab=1500, seed=4), (0, 9))
    cache, turns = hf.ParallelCache() if hasattr(model, "seqpar") else None, []
    for turn in range(2):
        options = {"past_key_values": cache} if cache is not None else {}
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
        turns.append(out)
        new = prompts(2, 6, vocab=1500, seed=turn)
        ids = torch.cat([out, new], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
    return turns


def pairs_agree(mesh: comm.DeviceMesh, pairs: tuple[tuple[str, str], ...], expected: list[torch.Tensor]) -> None:
    for prefill, decode in pairs:
        model = hf.load(CHECKPOINT, mesh, dtype=torch.float32, progress=False, prefill=prefill, decode=decode)
        for turn, (found, wanted) in enumerate(zip(conversation(model), expected, strict=True)):
            assert torch.equal(found, wanted), (prefill, decode, turn, found, wanted)


@pytest.fixture(scope="module")
def bundled() -> list[torch.Tensor]:
    return conversation(AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval())


@pytest.mark.parametrize("layout", thinned([*SMALL, (1, 4)], ((1, 2), (2, 2)).__contains__), ids=name_of)
def test_greedy_tokens_of_the_bundled_model(layout: tuple[int, int], bundled: list[torch.Tensor]) -> None:
    run_mesh(layout, pairs_agree, PAIRS, bundled)


def padded(batch: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of 11, 1 and 7 tokens: shorter than the ranks, and not."""
    ids, mask = left_padded(prompts(3, 11, seed=2), (0, 10, 4))
    return {"input_ids": ids[:batch], "attention_mask": mask[:batch]}


def same(mesh: comm.DeviceMesh, kind: str, options: dict[str, Any]) -> None:
    """Logits and hidden states of every step, and tokens."""
    model, oracle, inputs = tiny_model(kind), exact_norms(tiny_model(kind)), padded()
    close = (
        {"rtol": 0, "atol": 1e-5} if kind in MIXTURES else EXACT
    )  # Transformers' probabilities of experts are float32
    keep = inputs["attention_mask"].bool()
    more = {"attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)}
    with torch.no_grad():
        expected = oracle(**inputs, output_hidden_states=True)
        turn = oracle(prompts(3, 4), past_key_values=expected.past_key_values, **more).logits
    tokens = oracle.generate(**inputs, max_new_tokens=6, do_sample=False)
    with hf.parallelize(model, mesh, **options), torch.no_grad():
        for use_cache in (False, True):
            out = model(**inputs, output_hidden_states=True, use_cache=use_cache)
            torch.testing.assert_close(out.logits[keep], expected.logits[keep], **close)
            for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(ours[keep], theirs[keep], **close)
        again = model(prompts(3, 4), past_key_values=out.past_key_values, **more).logits
        torch.testing.assert_close(again, turn, **close)
        few = model(**inputs, logits_to_keep=torch.tensor([10, 3, 9]))
        seen = keep[:, [10, 3, 9]]
        torch.testing.assert_close(few.logits[seen], expected.logits[:, [10, 3, 9]][seen], **close)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)


KINDS = (*ARCHITECTURES, *MIXTURES)


@pytest.mark.parametrize("kind", thinned(KINDS, ("mistral", "qwen3").__contains__))
def test_windows_norms_and_heads_that_nothing_divides(kind: str) -> None:
    run_mesh((1, 3), same, kind, {"prefill": "ring", "decode": "qship"})
    run_mesh((2, 2), same, kind, {"prefill": "ring", "decode": "local"})
    run_mesh((1, 2), same, kind, {"prefill": "ulysses", "decode": "qship"})


@pytest.mark.slow
def test_beside_other_techniques() -> None:
    ring = {"prefill": "ring", "decode": "qship"}
    run_mesh((2, 2), same, "llama", {**ring, "sequence_sharded": True})
    run_mesh((1, 2), same, "qwen3_moe", {**ring, "experts": "ep"})
    run_mesh((2, 1), same, "qwen3", {**ring, "overlap": Interleave(3, min_tokens=4)})
    run_mesh((1, 2), same, "mistral", {**ring, "overlap": Interleave(cuts=(1, 7, 13), min_tokens=14)})
    shift = Shift(((1, Layout(4, 1)), (5, Layout(2, 2)), (30, Layout(1, 4))))
    for pair in PAIRS[1:]:
        run_mesh((1, 4), same, "qwen3", {"prefill": pair[0], "decode": pair[1], "shift": shift})
    run_mesh((1, 2), same, "qwen3", {"decode": "qship", "pipeline": ThreePhase(2, 2)})


def on_the_wire(mesh: comm.DeviceMesh, pair: tuple[str, str]) -> int:
    """In 8 bits every step is off by about as much as under Ulysses; what a prompt's attention sends."""
    inputs, model, found = padded(), tiny_model("qwen3").float(), {}
    keep = inputs["attention_mask"].bool()
    truth = model(**inputs).logits[keep]
    more = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    after = model(prompts(3, 1), attention_mask=more, past_key_values=model(**inputs).past_key_values).logits
    for options in ({}, {"prefill": pair[0], "decode": pair[1]}):
        with hf.parallelize(model, mesh, wire="int8", **options), torch.no_grad():
            with comm.record() as sent:
                out = model(**inputs)
            decoded = model(prompts(3, 1), attention_mask=more, past_key_values=out.past_key_values).logits
            found[bool(options)] = [float((out.logits[keep] - truth).norm()), float((decoded - after).norm())]
    for plain, ours in zip(found[False], found[True], strict=True):
        assert 0 < ours < 3 * plain, (ours, plain)
    return sum(count.num_bytes for label, count in sent.by_label().items() if label.endswith("self_attn.core"))


def test_wire_formats() -> None:
    for pair in PAIRS[1:]:
        sent = run_mesh((1, 2), on_the_wire, pair)
    # Of prompts of 11, 1 and 7 tokens each rank has eight that the other one sees, in three layers of four KV heads.
    assert sent == [3 * 2 * 4 * 8 * (6 + 2)] * 2  # a byte for each of six numbers, and a scale


def test_sparse_prompts_that_leave_nothing_out() -> None:
    """Sliced by tokens, they are cached by all-to-alls in each layer, and chunks see each other's."""
    every = hf.CSA(TopMass(1.0))
    run_mesh((2, 2), same, "qwen3", {"prefill": every, "decode": "qship"})
    run_mesh((1, 3), same, "llama", {"prefill": hf.CSA(Strided(((3, 1),))), "decode": "local"})
    run_mesh((1, 3), same, "llama", {"prefill": hf.CSA(Strided(((3, 1),)), "ulysses"), "decode": "qship"})
    run_mesh((1, 2), same, "mistral", {"prefill": every, "decode": "qship", "overlap": Interleave(2, min_tokens=4)})


def sparse(mesh: comm.DeviceMesh) -> list[int]:
    """Fewer bytes change the logits, and gradients are refused."""
    model, ids, sent, found = tiny_model("llama"), prompts(1, 96), [], []
    for policy in (TopMass(1.0), TopMass(0.5), Strided(((2, 4),), sinks=0, recent=0)):
        with hf.parallelize(model, mesh, prefill=hf.CSA(policy)):
            with torch.no_grad(), comm.record() as counted:
                found.append(model(ids, logits_to_keep=1, use_cache=False).logits)
            sent.append(sum(c.num_bytes for label, c in counted.by_label().items() if "self_attn.core" in label))
            with pytest.raises(ValueError, match='`prefill` must be "ring" or "ulysses" where gradients are wanted'):
                model(ids)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    return sent


def test_policies_send_less() -> None:
    first, last = run_mesh((1, 2), sparse)
    assert last[0] == 0 and first[1] < first[0] and first[2] * 3 < first[0]  # the last slice is seen by none


COSTS = DecodeCosts(  # ships from 14 cached tokens of one request on, from 7 of two
    MethodCosts(Curve((1,), (1e-5,)), {1: Curve((0, 100), (0.0, 1e-3))}),
    MethodCosts(Curve((1,), (1e-5 + 6.7e-5,)), {1: Curve((0, 100), (0.0, 5e-4))}),
)


def chooses(mesh: comm.DeviceMesh, prefill: Any) -> list[tuple[str, int]]:
    """Where the cache of one request of ten tokens and more lies after each step, and the moves by then."""
    model, ids, where, moves = tiny_model("llama"), prompts(1, 18), [], 0
    expected = exact_norms(tiny_model("llama"))(ids).logits
    with hf.parallelize(model, mesh, prefill=prefill, decode=hf.AutoDecode(costs=COSTS)) as parallel, torch.no_grad():
        assert parallel.explain_decode() == "undecided: no decode has run so far"
        cache, found = hf.ParallelCache(), []
        for first, last in ((0, 10), (10, 11), (11, 15), (15, 16), (16, 17), (17, 18)):
            with comm.record() as sent:
                found.append(model(ids[:, first:last], past_key_values=cache).logits)
            moves += "model.move" in sent.by_label()
            where.append((store_of(cache, 3).home, moves))
        torch.testing.assert_close(torch.cat(found, 1), expected, **EXACT)
        assert "crossover at 14 tokens" in parallel.explain_decode()
        assert parallel.kv_token_bytes == 2 * 3 * 8 * 8  # of the one KV head here, or of half of both
        cache.reset()
        model(ids, past_key_values=cache)
        assert store_of(cache, 3).home == ("tokens" if prefill == "ring" else "heads")
    return where


def test_auto_moves_a_cache_when_the_rule_says_so_and_never_back() -> None:
    assert run_mesh((1, 2), chooses, "ulysses")[0] == [("heads", 0)] * 3 + [("tokens", 1)] * 3
    assert run_mesh((1, 2), chooses, "ring")[0] == [("tokens", 0)] + [("heads", 1)] * 5


def certified(mesh: comm.DeviceMesh, rope: RopeConfig | None) -> int:
    """Bytes of a prompt whose policy names a rotary embedding, or leaves that to the model."""
    model, ids = tiny_model("llama"), prompts(1, 256)
    expected = exact_norms(tiny_model("llama"))(ids, logits_to_keep=1).logits
    prefill = hf.CSA(Certified(0.01, rope=rope))
    with hf.parallelize(model, mesh, prefill=prefill), torch.no_grad(), comm.record() as sent:
        found = model(ids, logits_to_keep=1, use_cache=False).logits
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    return sum(count.num_bytes for label, count in sent.by_label().items() if "self_attn.core" in label)


def test_certified_keys_are_told_of_the_models_rotary_embedding() -> None:
    known = rope_of(tiny_model("llama").config, 8)
    assert known is not None
    models, wrong = (run_mesh((1, 2), certified, rope) for rope in (None, RopeConfig(8, 2.0)))
    assert models == run_mesh((1, 2), certified, known) != wrong
    for scaling in ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, {}):
        model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5, **LLAMA3, **scaling})
        rope = rope_of(model.config, 8)
        assert rope is not None
        positions = torch.arange(99)
        for ours, theirs in zip(
            rope_table(rope, positions), model.model.rotary_emb(torch.ones(1), positions[None]), strict=True
        ):
            assert torch.equal(ours, theirs[0])
    for kind in ("dynamic", "unheard of"):
        model.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
        assert rope_of(model.config, 8) is None


LLAMA3 = {"original_max_position_embeddings": 32}


def measures(mesh: comm.DeviceMesh, file: str) -> None:
    """Once, at the first decode, and not in what the caller counts; a file of it is read by the next."""
    model, ids = tiny_model("mistral"), prompts(2, 9)
    expected = tiny_model("mistral").generate(ids, max_new_tokens=4, do_sample=False)
    auto = hf.AutoDecode(contexts=(16, 32), file=file)
    with hf.parallelize(model, mesh, decode=auto, shift=4) as parallel:
        with torch.no_grad():
            model(ids, past_key_values=(cache := hf.ParallelCache()))
            assert auto.costs is None
            with comm.record() as sent:
                model(ids[:, :1], past_key_values=cache)
        assert auto.costs is not None and auto.costs.window == 5 and "calibrate" not in sent.by_label()
        costs = auto.costs
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        assert auto.costs is costs and "measured on 2 rank(s)" in parallel.explain_decode()
        assert DecodeCosts.load(file) == costs
    if comm.groups(mesh).flat.rank() == 0:
        COSTS.save(file)
    again = hf.AutoDecode(file=file)
    with hf.parallelize(model, mesh, decode=again):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert again.costs == COSTS


def test_auto_measures_at_the_first_decode(tmp_path: Path) -> None:
    run_mesh((1, 2), measures, str(tmp_path / "costs.json"))
    with own_errors(), pytest.raises(ValueError, match="`costs` must be given alone or left out for those of `file`"):
        hf.AutoDecode(costs=COSTS, file="x")
    with own_errors(), pytest.raises(ValueError, match="`contexts` must be at least 1 and increasing"):
        hf.AutoDecode(contexts=(9, 3))
    with own_errors(), pytest.raises(TypeError, match=r"`policy` must be a Policy such as layers\.TopMass, got 3"):
        hf.CSA(3)  # type: ignore[arg-type]


OTHERS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": 7},
    "chunked": {"prefill_chunk_size": 3},
    "uncached": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 2, "max_new_tokens": 12},  # crops what it has guessed wrongly
}


def decodes(mesh: comm.DeviceMesh, how: str, pair: tuple[str, str]) -> None:
    inputs, model = padded(1 if how == "lookup" else 3), tiny_model("llama")
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **OTHERS[how]}
    expected = model.generate(**inputs, **options)
    with hf.parallelize(model, mesh, prefill=pair[0], decode=pair[1]):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("pair", PAIRS[1:], ids=PAIR)
@pytest.mark.parametrize("how", OTHERS)
def test_other_decodings(how: str, pair: tuple[str, str]) -> None:
    run_mesh((1, 2), decodes, how, pair)


def trains(mesh: comm.DeviceMesh, sharded: bool) -> None:
    """Loss and every gradient of a right-padded step through a ring."""
    model, reference = tiny_model("qwen3"), exact_norms(tiny_model("qwen3"))
    ids, mask = prompts(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    parallel = hf.parallelize(model, mesh, prefill="ring", sequence_sharded=sharded)
    for each in (reference, model):
        out = each(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states = [state[mask.bool()].square().mean() for state in out.hidden_states[1:]]
        losses.append(cross_entropy(out.logits, labels) + sum(states))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], **EXACT)
    parallel.sync_gradients()
    for param in model.parameters():
        param.data = param.grad
    gathered = parallel.gather_state_dict()
    for name, param in reference.named_parameters():
        torch.testing.assert_close(gathered[name], param.grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", [(1, 3), (2, 2)], ids=name_of)
def test_gradients_through_a_ring(layout: tuple[int, int]) -> None:
    run_mesh(layout, trains, layout[0] > 1)


def steps(mesh: comm.DeviceMesh, pair: tuple[str, str], context: int) -> list[dict[str, tuple[int, int]]]:
    """Messages and bytes by label: of a prompt, two decodes, a second prompt and a decode."""
    model, found = tiny_model("llama"), []
    ids = prompts(2, context)
    with hf.parallelize(model, mesh, prefill=pair[0], decode=pair[1]), torch.no_grad():
        cache = hf.ParallelCache()
        for new in (ids, ids[:, :1], ids[:, 1:2], ids[:, :5], ids[:, :1]):
            with comm.record() as sent:
                model(new, past_key_values=cache, logits_to_keep=1)
            found.append({label: (count.calls, count.num_bytes) for label, count in sent.by_label().items()})
        kv = store_of(cache, 3).kv
        assert isinstance(kv, StripedKV) == (pair[1] == "qship")
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=PAIR)
def test_a_cache_is_moved_once_and_decodes_send_as_much_over_any_context(pair: tuple[str, str]) -> None:
    short, long = (run_mesh((1, 2), steps, pair, context)[0] for context in (12, 96))
    moves = [step.get("model.move", (0, 0))[0] for step in long]
    across = pair in (("ulysses", "qship"), ("ring", "local"))
    assert [bool(count) for count in moves] == [False, across, False, False, False]
    assert moves[1] in (0, 3)  # one all-to-all for each of three layers
    for step in (2, 4):
        layers = [{name: sent for name, sent in run[step].items() if ".layers." in name} for run in (short, long)]
        assert layers[0] == layers[1] and layers[0] == {k: v for k, v in short[2].items() if ".layers." in k}
        (core,) = {sent for name, sent in layers[1].items() if name.endswith("self_attn.core")}
        if pair[1] == "qship":  # an all-gather of q, k and v of one token, an all-to-all of one of out and LSE
            assert core == (2, 1 * (6 + 2 * 2) * 8 * 8 + 1 * 6 * (8 * 8 + 8))
    if pair == ("ring", "qship"):  # tokens are dealt out as they are cached: keys and values go round, nothing else
        assert {sent for name, sent in long[0].items() if name.endswith("self_attn.core")} == {(1, 96 * 2 * 2 * 8 * 8)}


def test_the_rule() -> None:
    heads = HeadMap(8, 2, 1, 2)
    ring, ulysses = Way("ring", "tokens", "striped"), Way(None, "heads")
    cases: list[tuple[str, str, tuple[int, ...], tuple[int, ...], str, Way]] = [
        ("ulysses", "local", (5, 1), (0, 0), "heads", ulysses),
        ("ulysses", "local", (1, 1), (9, 9), "heads", ulysses),
        ("ulysses", "qship", (1, 1), (0, 0), "heads", ulysses),  # prompts of one token
        ("ulysses", "qship", (1, 0), (9, 9), "heads", Way("qship", "tokens")),
        ("ulysses", "qship", (5, 1), (9, 9), "heads", ulysses),  # a prompt in chunks
        ("ulysses", "qship", (5, 1), (9, 9), "tokens", Way("qship", "tokens")),
        ("ring", "local", (1, 1), (0, 0), "heads", ring),
        ("ring", "local", (5, 1), (9, 0), "tokens", ring),
        ("ring", "local", (1, 1), (9, 9), "tokens", ulysses),
        ("ring", "local", (5, 1), (9, 9), "heads", ulysses),  # moved before, and not back
        ("ring", "qship", (1, 1), (9, 9), "tokens", Way("qship", "tokens")),
        ("ring", "qship", (5, 1), (9, 9), "tokens", ring),
        ("ring", "qship", (5, 1), (900, 9), "tokens", Way("ring-q", "tokens", "striped")),
    ]
    for prefill, decode, new, cached, home, expected in cases:
        rule = Attend(prefill, decode, heads=heads, head_dim=16)  # type: ignore[arg-type]
        assert rule.path_of(new, cached, home, itemsize=2) == expected, (prefill, decode, new, cached, home)  # type: ignore[arg-type]


def reports(mesh: comm.DeviceMesh) -> None:
    """What a token costs where decodes read it, and the words for it."""
    sizes = {}
    for pair in PAIRS:
        model = tiny_model("mistral")
        with hf.parallelize(model, mesh, prefill=pair[0], decode=pair[1]) as parallel:
            sizes[pair] = parallel.kv_token_bytes
            assert parallel.memory().kv_token_bytes == sizes[pair]
            assert ("queries are shipped to 2 rank(s)" in parallel.explain_decode()) == (pair[1] == "qship")
            crosses = pair in (("ulysses", "qship"), ("ring", "local"))
            assert ("moved before the first one" in parallel.explain_decode()) == crosses
    both = 2 * 3 * 16 * 8  # K and V of the one KV head, in three layers; by heads both ranks hold it
    assert sizes == {pair: both if pair[1] == "local" else both // 2 for pair in PAIRS}


def test_reports() -> None:
    run_mesh((1, 2), reports)


def refusals(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    ring = {"prefill": "ring"}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"prefill": "rings"}, TypeError, '`prefill` must be "ulysses", "ring" or a CSA, got \'rings\''),
        ({"decode": None}, TypeError, '`decode` must be "local", "qship", "auto" or an AutoDecode, got None'),
        ({"prefill": hf.CSA(TopMass()), "wire": "int8"}, ValueError, "`wire` must be None with prefill=CSA(policy="),
        ({**ring, "pipeline": ThreePhase(2, 2)}, ValueError, "`pipeline` must be None with prefill='ring'"),
        ({**ring, "overlap": "auto"}, ValueError, "`overlap` must be \"off\" or an Interleave with prefill='ring'"),
    ]
    for options, kind, message in cases:
        with comm.record() as sent, own_errors(), pytest.raises(kind) as caught:
            hf.parallelize(model, mesh, **options)
        assert message in str(caught.value), str(caught.value)
        assert {name for _, name in sent.counts} <= {"agree"}
    with hf.parallelize(model, mesh, decode="qship"), torch.no_grad():
        with pytest.raises(ValueError, match="`page_size` must be a multiple of the 2 sequence ranks, over which"):
            model(prompts(1, 4), past_key_values=hf.ParallelCache(num_pages=4, page_size=3))
        bounded = hf.ParallelCache(num_pages=3, page_size=4)
        for new in (prompts(1, 7), prompts(1, 1), prompts(1, 4)):
            model(new, past_key_values=bounded)
        with pytest.raises(ValueError, match="out of pages"):
            model(prompts(1, 1), past_key_values=bounded)
        bounded.reset()
        model(prompts(1, 12), past_key_values=bounded)
    with hf.parallelize(model, mesh, prefill="ring", decode="qship") as parallel:
        out = model(prompts(1, 7))
        with pytest.raises(ValueError, match="`past_key_values` must be empty where gradients are wanted"):
            model(prompts(1, 1), past_key_values=out.past_key_values)
        assert parallel.model is model


def test_refusals_and_bounded_memory() -> None:
    run_mesh((1, 2), refusals)
