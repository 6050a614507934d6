"""A wire format under Hugging Face's own forward and `generate`: ranks agree, also in chunks; the ends stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqpar import comm
from seqpar.hf import load, parallelize
from seqpar.partition import Interleave, ThreePhase
from tests.hf.tiny import prompts, tiny_model
from tests.kernels.own_errors import own_errors
from tests.layers.reference import name_of
from tests.ranks import run_mesh, thinned


def model_of(kind: str = "llama") -> Any:
    return tiny_model(kind, dtype=torch.float32)


def logits(mesh: comm.DeviceMesh, **options: Any) -> tuple[torch.Tensor, comm.Recorder]:
    model, ids = model_of(), prompts(2, 12)
    with parallelize(model, mesh, **options), torch.no_grad(), comm.record() as counts:
        out = model(ids).logits
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    everyone = comm.all_gather(tokens[None], group=comm.groups(mesh).flat)
    assert (everyone == tokens).all() and tokens.shape == (2, 17)
    return out, counts


def near(mesh: comm.DeviceMesh, sequence_sharded: bool) -> None:
    plain, exact = logits(mesh, sequence_sharded=sequence_sharded)
    for schedule in ({}, {"overlap": Interleave(2, min_tokens=4)}, {"pipeline": ThreePhase(min_tokens=4)}):
        coded, counts = logits(mesh, sequence_sharded=sequence_sharded, wire="int8", **schedule)
        assert 1e-4 < (coded - plain).norm() / plain.norm() < 0.05
        if not schedule:
            for (op, label), count in counts.counts.items():
                before = exact.counts[op, label]
                assert count == before if ".layers." not in label else count.num_bytes < 0.5 * before.num_bytes, label


@pytest.mark.parametrize("layout", thinned([(2, 1), (1, 2), (2, 2)], (2, 2).__eq__), ids=name_of)
def test_ranks_agree_and_only_the_layers_round(layout: tuple[int, int]) -> None:
    run_mesh(layout, near, False)
    if layout == (2, 1):
        run_mesh(layout, near, True)


def training(mesh: comm.DeviceMesh) -> None:
    """Straight through: gradients near those without a format."""
    grads = []
    for wire in (None, "int8"):
        model, ids = model_of(), prompts(2, 12)
        with parallelize(model, mesh, wire=wire) as parallel:
            model(ids, labels=ids).loss.backward()
            parallel.sync_gradients()
            grads.append({name: param.grad for name, param in model.named_parameters() if param.grad is not None})
    for name, want in grads[0].items():
        assert (grads[1][name] - want).norm() <= 0.1 * want.norm() + 1e-6, name


def test_it_trains() -> None:
    run_mesh((2, 1), training)


@own_errors()
def refusals(mesh: comm.DeviceMesh, folder: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r'`wire` must be "int8", "fp8" or None, got \'int4\''):
        parallelize(model, mesh, wire="int4")
    with pytest.raises(ValueError, match=r"`weight` must be float32, .* got torch.float64; leave out `wire`"):
        parallelize(tiny_model("llama"), mesh, wire="int8")
    rank = comm.groups(mesh).flat.rank()
    with pytest.raises(ValueError, match="must be the same on every rank"):
        parallelize(model, mesh, wire="int8" if rank else None)
    if rank == 0:
        model.save_pretrained(folder)
    comm.agree(None, group=comm.groups(mesh).flat)
    loaded = load(folder, mesh, wire="fp8")
    assert {layer.mlp.wire for layer in loaded.model.layers} == {"fp8"}


def test_bad_formats_are_refused_on_every_rank(tmp_path: Any) -> None:
    run_mesh((2, 1), refusals, str(tmp_path))
