"""Trains a small model on tp x sp, on the text of this file, beside the same training in one process.

    torchrun --nproc-per-node 2 examples/train_tp_sp.py --sp 2
    torchrun --nproc-per-node 4 examples/train_tp_sp.py --tp 2 --sp 2 --steps 60

The model is that of custom_model.py. What a parallel step adds to an ordinary one is a line: `sync_gradients`. Both
trainings begin with the same weights and see the same documents, so losses and weights stay equal but for rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from custom_model import Config, Model
from torch import Tensor

import seqpar
from seqpar import comm, layers
from seqpar.ragged import RaggedBatch

TEXT = torch.tensor(list(Path(__file__).read_bytes()))
LENGTHS = (61, 40, 96, 27)  # of the documents of a step; neither the same nor multiples of anything


def documents(steps: int) -> Iterator[list[Tensor]]:
    """Pieces of the text, the same ones on every rank."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = [int(torch.randint(len(TEXT) - length, (), generator=draw)) for length in LENGTHS]
        yield [TEXT[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def train(model: Model, steps: int) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = RaggedBatch.prefill(LENGTHS)  # four documents in a row; each attends to itself
    last = set(torch.tensor(LENGTHS).cumsum(0).sub(1).tolist())
    rows = [row for row in range(batch.num_tokens) if row not in last]  # that have a next byte
    losses = []
    for pieces in documents(steps):
        ids = torch.cat(pieces)
        logits = model(ids, batch, None, rows)  # of all rows, on every rank
        loss = F.cross_entropy(logits, ids[torch.tensor(rows) + 1])
        optimizer.zero_grad()
        loss.backward()
        layers.sync_gradients(model, model.groups)  # sums what is still partial: each rank saw its own tokens
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(tp: int, sp: int, steps: int) -> None:
    torch.set_num_threads(1)
    losses, weights = [], []
    for mesh in (seqpar.init_mesh(tp, sp), seqpar.init_mesh()):  # all ranks together, and each alone
        torch.manual_seed(0)
        model = Model(Config(vocab_size=256), comm.groups(mesh))
        losses.append(train(model, steps))
        weights.append(layers.gather_state_dict(model))
    for step, (ours, alone) in enumerate(zip(*losses, strict=True)):
        if torch.distributed.get_rank() == 0 and step % max(1, steps // 6) == 0:
            print(f"step {step:3}: loss {ours:.5f}, in one process {alone:.5f}")
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)
    assert losses[0][-1] < losses[0][0], "the loss must fall"
    if torch.distributed.get_rank() == 0:
        print(f"tp={tp} sp={sp}: from {losses[0][0]:.3f} to {losses[0][-1]:.3f} nats a byte, as in one process")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--sp", type=int, default=1, help="sequence-parallel ranks")
    parser.add_argument("--steps", type=int, default=30)
    main(**vars(parser.parse_args()))
