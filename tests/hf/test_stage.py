"""A checkpoint in stages: each reads its own layers alone, and the tokens are the model's, in any company."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from seqpar import comm
from seqpar.batching import Budget, PipelineFusion, Request, StallFree, TemporalFusion
from seqpar.hf import Stage, load, load_stage
from seqpar.kv import PagedKV
from seqpar.partition import Layout, Shift
from tests.hf.test_load import saved
from tests.hf.test_stepper import CHECKPOINT, NEW, PROMPTS, alone, policies
from tests.hf.tiny import prompts
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned


def generates(mesh: comm.DeviceMesh, seeds: list[int]) -> dict[str, Any]:
    """Random arrivals, pages and steps under every policy and some depths; what the ranks read."""
    stage = load_stage(CHECKPOINT, mesh, num_pages=1, page_size=1, dtype=torch.float32, progress=False)
    for seed in seeds:
        draw = random.Random(seed)
        policy, page_size = policies(draw)[seed % 6], draw.choice([1, 3, 8, 16])
        most = max(-(-(len(prompt) + NEW - 1) // page_size) for prompt, _ in alone())
        stage.kv = resized(stage.kv, most + draw.randint(0, 1 + most // 2), page_size)
        budget = Budget(draw.choice([8, 24, 100]), draw.randint(2, 4), draw.choice(["known", "whole", "known"]))
        options: dict[str, Any] = {"vocab_size": stage.vocab_size, "policy": policy, "budget": budget}
        depth = draw.choice([None, 1, 2, 3])
        loop = (
            PipelineFusion(stage, stage.kv, depth=depth, **options)
            if seed % 5
            else TemporalFusion(stage, stage.kv, **options)
        )
        missing, found = list(range(len(PROMPTS))), {}
        draw.shuffle(missing)
        while missing or loop.live:
            for _ in range(min(len(missing), draw.choice([0, 1, 3]))):
                number = missing.pop()
                found[number] = loop.add(Request(number, alone()[number][0], NEW, stop_tokens=[1]))
            loop.step()
        for number, (_, expected) in enumerate(alone()):
            assert found[number].tokens == expected, (seed, policy, depth, number)
        assert stage.kv.free_pages == stage.kv.num_pages
    names = {name for name, _ in stage.module.named_parameters()}
    return {"names": names, **stage.report._asdict(), "calls": stage.calls}


def resized(kv: PagedKV, num_pages: int, page_size: int) -> PagedKV:
    return PagedKV(kv.num_layers, num_pages, page_size, kv.num_kv_heads, kv.head_dim, dtype=kv.dtype)


@pytest.mark.parametrize(
    "shape", thinned([(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)], lambda shape: shape == (2, 1, 1)), ids=str
)
def test_any_company_through_stages(shape: tuple[int, int, int]) -> None:
    small = shape == (2, 1, 1)
    found = run_mesh(shape, generates, [15, 16, 19, 21] if small else list(range(30, 44)), timeout_s=240.0)
    whole = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    elements = sum(param.numel() for param in whole.parameters())
    for report in found:
        assert report["weight_bytes"] == 2 * report["bytes_read"], "float32 of bfloat16, and nothing else is read"
    if small:
        assert sum(report["bytes_read"] for report in found) == 2 * elements, "each tensor on one stage"
        assert found[0]["num_tensors"] == 1 + 2 * 9 and found[1]["num_tensors"] == 2 + 2 * 9
        stages = [{name.split(".")[1] for name in report["names"] if name.startswith("layers.")} for report in found]
        assert stages == [{"0", "1"}, {"2", "3"}]
        assert found[0]["calls"] == found[1]["calls"]
    else:
        assert max(report["bytes_read"] for report in found) < 0.6 * 2 * elements


def same_logits(mesh: comm.DeviceMesh, path: str) -> dict[str, int]:
    """In float64, of tied embeddings and windows in some layers, by two chunks of a prompt."""
    stage = load_stage(path, mesh, num_pages=8, page_size=4)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    ids = prompts(1, 11)
    with torch.no_grad():
        expected = model(ids).logits[0]
    assert isinstance(stage, Stage) and stage.kv.num_layers == len(stage.module.layers)
    first = stage(stage.kv.batch(["a"], [7]), ids[0, :7], [])
    assert first.shape == (0, stage.vocab_size)
    logits = stage(stage.kv.batch(["a"], [4]), ids[0, 7:], [1, 3])
    torch.testing.assert_close(logits, expected[[8, 10]], atol=1e-5, rtol=1e-5)  # Transformers' norms are in float32
    if stage.module.embed_tokens is not None and stage.module.lm_head is not None:
        assert "lm_head.weight" not in dict(stage.module.named_parameters())
    return {
        "read": stage.report.bytes_read,
        "embedding": model.model.embed_tokens.weight.nbytes,
        "all": sum(param.nbytes for param in model.parameters()),
    }


@pytest.mark.parametrize(
    "shape", thinned([(2, 1, 1), (1, 1, 1), (3, 1, 1), (2, 2, 1)], lambda s: s == (2, 1, 1)), ids=str
)
def test_tied_embeddings_are_read_where_they_are_used(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    found = run_mesh(shape, same_logits, str(saved(tmp_path, "qwen2")))
    if shape[1:] == (1, 1):
        twice = found[0]["embedding"] if shape[0] > 1 else 0
        assert sum(each["read"] for each in found) == found[0]["all"] + twice


def refuses(mesh: comm.DeviceMesh, path: str) -> None:
    rank = comm.stages(mesh).whole.rank()
    options: dict[str, Any] = {"num_pages": 2, "page_size": 2, "progress": False}
    deep = comm.init_mesh(1, 1, "cpu", pp=4)
    with pytest.raises(ValueError, match=r"`pp` must be at least 1 and at most the number of layers \(3\), got 4"):
        load_stage(path, deep, **options)
    with own_errors(), pytest.raises(ValueError, match="`page_size` must be at least 1"):
        load_stage(path, mesh, **{**options, "page_size": 0})
    with pytest.raises(ValueError, match=r"`path` must be a directory with config\.json, got nowhere"):
        load_stage(path if rank else "nowhere", mesh, **options)
    with pytest.raises(ValueError, match="checkpoint, `dtype` and options must be the same on every rank, got another"):
        load_stage(path, mesh, **{**options, "num_pages": 2 + rank})
    with pytest.raises(ValueError, match=r'`mesh` must have the axes \("tp", "sp"\), got \(\'pp\''):
        load(path, mesh)
    with pytest.raises(ValueError, match=r'`mesh` must have the axes \("pp", "tp", "sp"\), got'):
        load_stage(path, comm.init_mesh(4, 1, "cpu"), **options)
    for method, message in (
        ({"shift": "auto"}, "`shift` must be given or \"off\" for stages, which do not measure, got 'auto'"),
        ({"overlap": "auto"}, "`overlap` must be given or \"off\" for stages, which do not measure, got 'auto'"),
        ({"overlap": 5}, '`overlap` must be an Interleave or "off" for stages, got 5'),
    ):
        with own_errors(), pytest.raises(TypeError, match=message):
            load_stage(path, mesh, **options, **method)
    with own_errors(), pytest.raises(ValueError, match=r"`shift` must have layouts that are reachable from the stored"):
        load_stage(path, mesh, **options, shift=Shift(((1, Layout(1, 2)),)))
    stage = load_stage(path, mesh, **options)
    with own_errors(), pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        PipelineFusion(stage, stage.kv, vocab_size=67, policy=StallFree(4), budget=Budget(4, 4), depth=0)


@pytest.mark.slow
def test_what_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_mesh((2, 2, 1), refuses, str(saved(tmp_path, "llama")), isolated=True)
