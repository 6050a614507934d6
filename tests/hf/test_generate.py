"""Hugging Face's `generate` on a parallelized model gives the tokens that the unswapped model gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from seqpar import comm, hf
from tests.hf.tiny import ARCHITECTURES, left_padded, prompts, random_overrides, tiny_model
from tests.ranks import LAYOUTS, SMALL, run_mesh, thinned

NAME = "tp={0[0]}-sp={0[1]}".format
DECODINGS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": 7},
    "chunked": {"prefill_chunk_size": 3},
    "uncached": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 2, "max_new_tokens": 12},
}
# each decoding on pure tp, pure sp (one that divides nothing) and both, each time for another architecture
CASES = [
    (kind, how, layout)
    for i, how in enumerate(DECODINGS)
    for j, layout in enumerate([(2, 1), (1, 3), (2, 2)])
    for kind in [ARCHITECTURES[(i + j) % 4]]
]


def generate(model: Any, how: str | None = None, **inputs: Any) -> torch.Tensor:
    """Tokens, from the same random state every time."""
    torch.manual_seed(5)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **DECODINGS.get(how or "", {})}
    with torch.no_grad():
        return model.generate(**inputs, **options)


def decodes_as_transformers(mesh: comm.DeviceMesh, kind: str, how: str | None, overrides: dict[str, Any]) -> None:
    model = tiny_model(kind, **overrides)
    batch = 1 if how == "lookup" else 3
    ids, mask = left_padded(prompts(batch, 8, vocab=model.config.vocab_size), (2, 0, 5)[:batch])
    expected = generate(model, how, input_ids=ids, attention_mask=mask), logits(model, ids, mask)
    hf.parallelize(model, mesh)
    found = generate(model, how, input_ids=ids, attention_mask=mask), logits(model, ids, mask)
    assert torch.equal(found[0], expected[0]), (found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)  # Transformers' norms round to float32


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=NAME)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_tokens_of_a_left_padded_batch(kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, decodes_as_transformers, kind, None, {})


@pytest.mark.parametrize("seed", range(16))
def test_random_configs(seed: int) -> None:
    draw = random.Random(seed)
    kind, layout = ARCHITECTURES[seed % 4], draw.choice(LAYOUTS)
    run_mesh(layout, decodes_as_transformers, kind, None, random_overrides(kind, draw, layout[0] * layout[1]))


@pytest.mark.parametrize(("kind", "how", "layout"), CASES)
def test_other_decodings(kind: str, how: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, decodes_as_transformers, kind, how, {})


@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_types(rope: dict[str, Any], sp: int) -> None:
    """Also past the length from which "dynamic" changes with every token."""
    overrides = {"rope_parameters": {"rope_theta": 100.0, **rope}, "max_position_embeddings": 10}
    run_mesh((2 // sp, sp), decodes_as_transformers, "llama", None, overrides)


class Collect(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def streams_on_one_rank(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    hf.parallelize(model, mesh)
    streamer = Collect() if comm.groups(mesh).flat.rank() == 1 else None
    tokens = generate(model, input_ids=prompts(1, 5), streamer=streamer)
    if streamer is not None:
        assert streamer.tokens == [*tokens[0].tolist(), -1]


def test_a_streamer_on_one_rank() -> None:
    run_mesh((2, 1), streams_on_one_rank)


def samples_from_rank_0(mesh: comm.DeviceMesh) -> list[list[int]]:
    model = tiny_model("llama")
    hf.parallelize(model, mesh)
    drawn = []
    torch.manual_seed(comm.groups(mesh).flat.rank())
    for _ in range(2):
        tokens = model.generate(prompts(2, 5), do_sample=True, max_new_tokens=5, pad_token_id=0, temperature=3.0)
        drawn.append(tokens.tolist())
    return drawn


def test_ranks_with_other_seeds_sample_the_tokens_of_rank_0() -> None:
    first, second = run_mesh((1, 2), samples_from_rank_0)
    (alone,) = run_mesh((1, 1), samples_from_rank_0)
    assert first == second == alone
    assert first[0] != first[1]


def continues(mesh: comm.DeviceMesh, given: str) -> None:
    """Two turns over one cache, the second with only the new tokens, both left-padded."""
    ids, mask = left_padded(prompts(2, 6), (0, 2))
    more = prompts(2, 3, seed=3)
    model = tiny_model("mistral")
    full = torch.cat([generate(model, input_ids=ids, attention_mask=mask), more], 1)
    full_mask = torch.cat([mask, torch.ones(2, full.shape[1] - 6, dtype=torch.long)], 1)
    expected = generate(model, input_ids=full, attention_mask=full_mask)
    hf.parallelize(model, mesh)
    cache = DynamicCache() if given == "dynamic" else hf.ParallelCache()
    if given == "paged":
        cache = hf.ParallelCache(num_pages=12, page_size=4)
    first = generate(model, input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(generate(model, input_ids=full, attention_mask=full_mask, past_key_values=cache), expected)
    assert torch.equal(first, full[:, :-3])


@pytest.mark.parametrize("given", ["dynamic", "parallel", "paged"])
def test_a_conversation_goes_on_from_its_cache(given: str) -> None:
    run_mesh((2, 1), continues, given)


def returns_everything(mesh: comm.DeviceMesh) -> None:
    """Scores, logits and hidden states of each step, from embeddings instead of ids."""
    model = tiny_model("llama")
    embeds = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate"), True)
    expected = generate(model, inputs_embeds=embeds, **options)
    hf.parallelize(model, mesh)
    found = generate(model, inputs_embeds=embeds, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits", "hidden_states"):  # Transformers' norms round to float32 on the way
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert found.past_key_values.get_seq_length() == 5 + 6 - 1


def test_everything_that_generate_can_return() -> None:
    run_mesh((1, 2), returns_everything)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "max_time": ({"max_time": 1.0}, "`max_time` must be None, since clocks of ranks differ, got 1.0"),
    "in a config": (
        {"generation_config": GenerationConfig(max_time=2.0)},
        "`max_time` must be None, since clocks of ranks differ, got 2.0",
    ),
    "criteria": (
        {"stopping_criteria": [MaxTimeCriteria(1.0)]},
        "`stopping_criteria` must be free of MaxTimeCriteria, since clocks of ranks differ, got one",
    ),
    "static": ({"cache_implementation": "static"}, "`cache_implementation` must be dynamic, got static"),
    "offloaded": ({"cache_implementation": "offloaded"}, "`cache_implementation` must be dynamic, got offloaded"),
    "quantized": ({"cache_implementation": "quantized"}, "`cache_implementation` must be dynamic, got quantized"),
    "paged": ({"cache_implementation": "paged"}, "`cache_implementation` must be dynamic, got paged"),
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        "`output_attentions` must be False: attention weights are never formed, got True",
    ),
    "synced": ({"synced_gpus": True}, "`synced_gpus` must be left out, since ranks of one model take the same steps"),
}


def refuses(mesh: comm.DeviceMesh, options: dict[str, Any], message: str) -> None:
    """Rank 1 alone asks for it, so that the others would hang if it were refused there only."""
    model = tiny_model("llama")
    hf.parallelize(model, mesh)
    mine = options if comm.groups(mesh).flat.rank() == 1 else {}
    with comm.record() as sent, pytest.raises(ValueError) as error:
        model.generate(prompts(1, 4), max_new_tokens=2, pad_token_id=0, **mine)
    assert message in str(error.value), str(error.value)
    assert sent.by_label().keys() == {"agree"}, sent.table()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_raise_on_every_rank(name: str) -> None:
    run_mesh((2, 1), refuses, *REFUSED[name])


def refuses_other_arguments(mesh: comm.DeviceMesh, what: str) -> None:
    model = tiny_model("llama")
    hf.parallelize(model, mesh)
    rank = comm.groups(mesh).flat.rank()
    options = {"tokens": {"input_ids": prompts(1, 4, seed=rank)}, "length": {"max_new_tokens": 2 + rank}}[what]
    message = "arguments of `generate` must be the same on every rank, got another than rank 0's on rank 1"
    with comm.record() as sent, pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": prompts(1, 4), "max_new_tokens": 2, "pad_token_id": 0, **options})
    assert sent.by_label().keys() == {"agree", "check_same"}, sent.table()


@pytest.mark.parametrize("what", ["tokens", "length"])
def test_ranks_that_call_it_differently_raise(what: str) -> None:
    run_mesh((1, 2), refuses_other_arguments, what)


def refuses_a_streamer_in_beam_search(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    hf.parallelize(model, mesh)
    streamer = Collect() if comm.groups(mesh).flat.rank() == 0 else None
    with pytest.raises(ValueError, match="`streamer` must be left out in beam search"):
        model.generate(prompts(1, 4), num_beams=2, max_new_tokens=2, pad_token_id=0, streamer=streamer)


def test_a_streamer_in_beam_search() -> None:
    run_mesh((2, 1), refuses_a_streamer_in_beam_search)
