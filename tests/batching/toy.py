"""A model that is a few lines: its next token depends on every token before it, read back out of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar import comm
from seqpar.batching import Request, sample
from seqpar.comm import Handle, Stages, Steps
from seqpar.kv import PagedKV
from seqpar.ragged import RaggedBatch
from tests.comm.fakes import FakeGroup

VOCAB = 31


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


def logits_after(tokens: Sequence[int]) -> Tensor:
    """Numbers that any other token, or any other order, changes."""
    state = len(tokens)
    for token in tokens:
        state = (state * 1103515245 + token + 12345) % (1 << 31)
    return torch.tensor([(state // (v + 1) ** 2 + 7919 * v * state) % 1009 / 100 for v in range(VOCAB)])


class Toy:
    """Keeps token ids as keys, in a cache of one layer."""

    def __init__(self, kv: PagedKV) -> None:
        self.kv, self.calls = kv, 0
        self.fails = False

    def __call__(self, batch: RaggedBatch, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        self.calls += 1
        if self.fails:
            raise RuntimeError("the model failed")
        keys = tokens.to(self.kv.dtype).view(-1, 1, 1)
        self.kv.append(0, keys, -keys, batch)
        stored, negative = self.kv.read(0, batch)
        assert list(rows) == sorted(rows)
        found = [self.logits(batch, row, stored, negative) for row in rows]
        return torch.stack(found) if found else torch.zeros(0, VOCAB)

    @staticmethod
    def logits(batch: RaggedBatch, row: int, stored: Tensor, negative: Tensor) -> Tensor:
        request = max(r for r, start in enumerate(batch.q_starts[:-1]) if start <= row and batch.q_lens[r])
        keys = batch.kv_lens[request] - (batch.q_starts[request + 1] - 1 - row)
        seen = stored[list(batch.pages[request])].flatten()[:keys]
        assert torch.equal(seen, -negative[list(batch.pages[request])].flatten()[:keys])
        return logits_after([int(token) for token in seen])


class ToyStage(Toy):
    """A toy in stages, each with a cache; what is handed over is the ids and the number of stages behind them."""

    def __init__(self, num_pages: int, page_size: int, stages: Stages) -> None:
        super().__init__(toy_cache(num_pages, page_size))
        self.stages = stages

    def steps(self, batch: RaggedBatch, tokens: Tensor, rows: Sequence[int]) -> Steps[Tensor | Handle]:
        pp, x = self.stages.pp, tokens.double()
        if pp.rank():
            x = yield from comm.recv_steps((len(x),), x.dtype, src=pp.rank() - 1, group=pp, label="x")
            assert torch.equal(x, tokens + 1000.0 * pp.rank()), "the micro-batch that is due"
        logits = self(batch, tokens, rows)
        if pp.rank() == pp.size() - 1:
            return logits
        return comm.send_async(x + 1000, dst=pp.rank() + 1, group=pp, label="x")


def one_stage() -> Stages:
    group: Any = FakeGroup(size=1)
    return Stages(group, group, group)


def alone(request: Request, say: Callable[[Sequence[int]], str] = text) -> tuple[list[int], str]:
    """What a request generates by itself, and why it ends; stop strings looked for in the whole text."""
    known, tokens = list(request.prompt), list[int]()
    while True:
        (token,) = sample(logits_after(known)[None], [request.sampling], [len(tokens)])
        known.append(token)
        tokens.append(token)
        if token in request.stop_tokens:
            return tokens, "stop_token"
        if any(stop in say(tokens) for stop in request.stop_strings):
            return tokens, "stop_string"
        if len(tokens) == request.max_new_tokens:
            return tokens, "length"


def toy_cache(num_pages: int, page_size: int) -> PagedKV:
    return PagedKV(1, num_pages, page_size, 1, 1)
