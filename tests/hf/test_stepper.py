"""The bundled model under the loop: requests in any company generate what each generates alone with Transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqpar import comm
from seqpar.batching import (
    Budget,
    DecodeMaximal,
    Exclusive,
    FullHybrid,
    PrefillFirst,
    Request,
    RequestLevel,
    Sampling,
    StallFree,
    TemporalFusion,
)
from seqpar.hf import Stepper, load, parallelize
from seqpar.partition import Interleave
from tests.hf.tiny import tiny_model
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned

CHECKPOINT = Path(__file__).parent.parent.parent / "examples" / "tiny-llama"
PROMPTS = (
    'def read_config(path, encoding=\'utf-8\'):\n    """Read a configuration file and return',
    "import os\nimport sys\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def",
)
NEW = 6

_ALONE: list[tuple[list[int], list[int]]] = []


def alone() -> list[tuple[list[int], list[int]]]:
    """Prompts, and what Transformers' own model makes of each by itself."""
    if not _ALONE:
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
            _ALONE.append((ids[0].tolist(), out[0, ids.shape[1] :].tolist()))
    return _ALONE


def policies(draw: random.Random) -> list[Any]:
    return [
        RequestLevel(),
        PrefillFirst(),
        FullHybrid(),
        DecodeMaximal(draw.randint(3, 12), 4),
        StallFree(draw.randint(2, 16)),
        Exclusive(draw.choice([0.0, 0.3])),
    ]


def generates_as_alone(mesh: comm.DeviceMesh, seeds: list[int], options: dict[str, Any]) -> int:
    """Random arrivals, pages and steps under every policy; returns how many were preempted."""
    model: Any = load(CHECKPOINT, mesh, dtype=torch.float32, progress=False, **options)
    preempted = 0
    for seed in seeds:
        draw = random.Random(seed)
        policy = policies(draw)[seed % 6]
        page_size = draw.choice([1, 3, 8, 16])
        most = max(-(-(len(prompt) + NEW - 1) // page_size) for prompt, _ in alone())
        stepper = Stepper(model, num_pages=most + draw.randint(0, 1 + most // 2), page_size=page_size)
        budget = Budget(draw.choice([8, 24, 100]), draw.randint(2, 4), draw.choice(["known", "whole", "known"]))
        loop = TemporalFusion(stepper, stepper.kv, vocab_size=stepper.vocab_size, policy=policy, budget=budget)
        missing, found = list(range(len(PROMPTS))), {}
        draw.shuffle(missing)
        while missing or loop.live:
            for _ in range(draw.choice([0, 1, 3]) if missing else 0):
                if missing:
                    number = missing.pop()
                    found[number] = loop.add(Request(number, alone()[number][0], NEW, stop_tokens=[1]))
            before = loop.latest
            loop.step()
            preempted += 0 if loop.latest in (None, before) else len(loop.latest.preempted)
        for number, (_, expected) in enumerate(alone()):
            assert found[number].tokens == expected, (seed, policy, number)
        assert stepper.calls == loop.steps and stepper.kv.free_pages == stepper.kv.num_pages
    return preempted


def test_any_company_on_one_rank() -> None:
    assert sum(run_mesh((1, 1), generates_as_alone, [8, 13, 15, 16, 18, 23], {}))


@pytest.mark.parametrize(
    "case",
    thinned(
        [
            ((1, 2), {"shift": 6}),
            ((2, 1), {}),
            ((1, 2), {"overlap": Interleave(chunks=2, min_tokens=6)}),
            ((2, 1), {"sequence_sharded": True}),
            ((2, 2), {"shift": 3}),
            ((1, 4), {}),
            ((1, 1), {}),
        ],
        lambda case: case == ((1, 2), {"shift": 6}),
    ),
    ids=str,
)
def test_any_company_on_several_ranks(case: tuple[tuple[int, int], dict[str, Any]]) -> None:
    layout, options = case
    few = options == {"shift": 6}
    run_mesh(layout, generates_as_alone, [8, 16] if few else list(range(20, 32)), options, timeout_s=240.0)


def samples_alike(mesh: comm.DeviceMesh) -> list[list[int]]:
    """Random tokens are the same in any company, on any layout."""
    model: Any = load(CHECKPOINT, mesh, dtype=torch.float32, progress=False)
    tokens = []
    for together in (True, False):
        stepper = Stepper(model, num_pages=40, page_size=16)
        loop = TemporalFusion(
            stepper,
            stepper.kv,
            vocab_size=stepper.vocab_size,
            policy=StallFree(16),
            budget=Budget(16, 4),
        )
        found = []
        for number in range(3):
            how = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=number)
            found.append(loop.add(Request(number, alone()[number][0], 6, how)))
            if not together:
                list(loop.run())
        list(loop.run())
        tokens.append([each.tokens for each in found])
    assert tokens[0] == tokens[1]
    return tokens[0]


def test_samples_are_alike() -> None:
    results = [each for layout in ((1, 1), (1, 2)) for each in run_mesh(layout, samples_alike)]
    assert all(each == results[0] for each in results)


def refuses(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    with own_errors(), pytest.raises(TypeError, match="`model` must be parallelized, got LlamaForCausalLM"):
        Stepper(model, num_pages=4, page_size=4)
    with (
        parallelize(model, mesh, decode="qship"),
        pytest.raises(ValueError, match='`model` must have prefill="ulysses" and decode="local", whose steps share'),
    ):
        Stepper(model, num_pages=4, page_size=4)
    with parallelize(model, mesh):
        model.model.rotary_emb.rope_type = "dynamic"
        with pytest.raises(ValueError, match="`rope_type` must give a token the same rotation in any batch"):
            Stepper(model, num_pages=4, page_size=4)


def test_what_is_refused() -> None:
    run_mesh((1, 1), refuses)
