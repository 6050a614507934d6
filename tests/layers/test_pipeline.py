"""Stages made of given modules: what they compute together, what travels, what hides, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Handle, Stages
from seqpar.layers import PipelineStage, gather_rows
from seqpar.partition import even_ranges, stage_layers
from seqpar.ragged import RaggedBatch
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh, thinned

LAYERS, M = 5, 3


class Embedding(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return (ids[:, None] * torch.tensor([1.0, 100.0, 10000.0])).double()


class Layer(nn.Module):
    """Affine in what it is given, so that order and number of layers are seen."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((M,), float(index), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor, batch: RaggedBatch, cos: Any, sin: Any, kv: Any) -> Tensor:
        return 2 * x + self.weight


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 1


class Head(nn.Module):
    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.group = stages.groups.sp

    def forward(self, x: Tensor, *, rows: list[int], num_tokens: int) -> Tensor:
        return gather_rows(x, rows=rows, num_tokens=num_tokens, group=self.group).repeat(1, 2)


def stage_of(stages: Stages) -> PipelineStage:
    pp = stages.pp
    mine = stage_layers(LAYERS, pp.size())[pp.rank()]
    parts: dict[str, Any] = {"embed_tokens": Embedding()} if pp.rank() == 0 else {}
    if pp.rank() == pp.size() - 1:
        parts |= {"norm": Norm(), "lm_head": Head(stages)}
    layers = [Layer(index) for index in range(*mine)]
    return PipelineStage(layers, stages=stages, hidden_size=M, first_layer=mine.start, **parts)


def expected(ids: Tensor, rows: list[int]) -> Tensor:
    x = Embedding()(ids)
    for index in range(LAYERS):
        x = 2 * x + index
    return (x - 1)[rows].repeat(1, 2)


def computes(mesh: comm.DeviceMesh) -> None:
    """Several micro-batches of ragged tokens, some of which leave a sequence rank with none."""
    stages = comm.stages(mesh)
    stage, pp, sp = stage_of(stages), stages.pp, stages.groups.sp
    for q_lens, rows in (((3, 1, 4), [2, 3, 7]), ((1,), [0]), ((6,), []), ((2, 5), [1])):
        batch = RaggedBatch.prefill(q_lens)
        ids = torch.arange(batch.num_tokens) + 5
        with comm.record() as sent, comm.check():
            logits = stage(ids, batch, rows=rows)
        if stage.is_last:
            assert torch.equal(logits, expected(ids, rows)) if rows else logits.shape == (0, M)
        else:
            assert logits is None
        mine = even_ranges(batch.num_tokens, sp.size())[sp.rank()].size
        num_bytes = 0 if stage.is_last else mine * M * 8
        assert sum(c.num_bytes for (op, _), c in sent.counts.items() if op == "send") == num_bytes
        labels = {label for op, label in sent.counts if op in ("send", "recv")}
        neighbours = {f"to stage {pp.rank() + 1}"} - {f"to stage {pp.size()}"} | {f"from stage {pp.rank() - 1}"}
        assert labels == neighbours - {"from stage -1"}


@pytest.mark.parametrize(
    "shape",
    thinned([(2, 1, 1), (1, 1, 1), (2, 1, 2), (4, 1, 1), (3, 1, 1)], lambda s: s in ((2, 1, 1), (1, 1, 1))),
    ids=str,
)
def test_stages_compute_the_whole(shape: tuple[int, int, int]) -> None:
    run_mesh(shape, computes)


def in_flight(mesh: comm.DeviceMesh) -> None:
    """What is asked for first arrives while another micro-batch is computed, and nobody waits for who is behind."""
    stages = comm.stages(mesh)
    stage = stage_of(stages)
    batches = [RaggedBatch.prefill([n]) for n in (4, 2, 3)]
    ids = [torch.arange(batch.num_tokens) for batch in batches]
    programs = [comm.start(stage.steps(x, batch, rows=[1])) for x, batch in zip(ids, batches, strict=True)]
    found = [comm.run(program) for program in programs]
    for x, out in zip(ids, found, strict=True):
        if isinstance(out, Handle):
            assert not stage.is_last and out.op == "send"
            out.wait()
        else:
            assert torch.equal(out, expected(x, [1]))


def test_micro_batches_in_flight() -> None:
    run_mesh((2, 1, 1), in_flight)


def refuses(mesh: comm.DeviceMesh) -> None:
    stages = comm.stages(mesh)
    rank, batch, ids = stages.pp.rank(), RaggedBatch.prefill([3]), torch.arange(3)
    stage, options = stage_of(stages), {"stages": stages, "hidden_size": M}
    parts: dict[str, Any] = {"embed_tokens": Embedding()} if rank == 0 else {"norm": Norm(), "lm_head": Head(stages)}
    wrong = {"embed_tokens": Embedding(), "norm": Norm(), "lm_head": Head(stages)}
    messages = (
        (
            lambda: PipelineStage([], **options, **parts),
            f"`layers` must be at least one, got none for stage {rank} of 2",
        ),
        (
            lambda: PipelineStage([Layer(0)], **options, **wrong),
            "`norm` must be on the last stage alone, got one on stage 0 of 2"
            if rank == 0
            else "`embed_tokens` must be on the first stage alone, got one on stage 1 of 2",
        ),
        (
            lambda: PipelineStage([Layer(0)], **options),
            "`embed_tokens` must be on the first stage alone, got none on stage 0 of 2"
            if rank == 0
            else "`norm` must be on the last stage alone, got none on stage 1 of 2",
        ),
        (lambda: stage(ids[:2], batch, rows=[0]), r"`tokens` must be the batch's 3 ids, got shape \[2\]"),
        (lambda: stage(ids, batch, rows=[0, 3]), r"`rows` must lie in \[0, 3\), got \[3\]"),
        (lambda: stage_layers(4, 5), r"`pp` must be at least 1 and at most the number of layers \(4\), got 5"),
        (lambda: stage_layers(4, 0), r"`pp` must be at least 1 and at most the number of layers \(4\), got 0"),
    )
    for call, message in messages:
        with own_errors(), pytest.raises(ValueError, match=message):
            call()
    next(stage.layers.parameters()).requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"a stage must run without gradients, got weights that want some; use torch\.no_grad"
    ):
        stage(ids, batch, rows=[0])
    with torch.no_grad():
        stage(ids, batch, rows=[0])


def test_what_is_refused_on_every_stage() -> None:
    run_mesh((2, 1, 1), refuses)
