"""Recorded decodes: what they give beside eager steps, whom they serve, and a batch whose lengths the device has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from seqpar import comm
from seqpar.hf import Recording, Stepper, parallelize, recording
from seqpar.hf.recording import PADDING, RecordedDecodes
from seqpar.kv import PagedKV
from seqpar.partition import GraphKey, Layout, Shift
from tests.hf.tiny import tiny_model
from tests.kernels.interpreter import interpreted
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh

TP, SP = Layout(2, 1), Layout(1, 2)


class Both:
    """The same steps with a recording and without."""

    def __init__(self, model: Any, pages: int, page_size: int, recording: Recording) -> None:
        self.ours = Stepper(model, num_pages=pages, page_size=page_size, recording=recording)
        self.eager = Stepper(model, num_pages=pages, page_size=page_size)

    def step(self, requests: dict[int, int], tolerance: float = 1e-10, rows: list[int] | None = None) -> Tensor:
        """So many new tokens of each; the logits of the last token of each, compared."""
        rng = torch.Generator().manual_seed(sum(requests) + self.ours.calls)
        tokens = torch.randint(0, 60, (sum(requests.values()),), generator=rng)
        found = []
        for stepper in (self.ours, self.eager):
            batch = stepper.kv.batch(list(requests), list(requests.values()))
            found.append(stepper(batch, tokens, batch.last_idx.tolist() if rows is None else rows))
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
        return found[0]

    def each(self, change: Any) -> None:
        for stepper in (self.ours, self.eager):
            change(stepper.kv)

    @property
    def counts(self) -> tuple[int, int]:
        recorded = self.ours.recorded
        assert recorded is not None and recorded.graphs.eager == 0
        return recorded.graphs.replays, self.ours.calls


def decodes(mesh: comm.DeviceMesh, shift: Any) -> list[GraphKey]:
    """Requests of any number and length; some leave, pages move, a prompt comes in between."""
    model = tiny_model("llama")
    with parallelize(model, mesh, shift=shift):
        both = Both(model, 16, 3, Recording((1, 2, 4), max_len=10))
        both.step({0: 4, 1: 1, 2: 7})
        assert both.counts == (0, 1)
        both.step({0: 1, 1: 1, 2: 1})  # four rows, of which one is nobody's
        both.step({2: 1, 1: 1})  # in another order
        both.step({1: 1})
        assert both.counts == (3, 4)
        both.each(lambda kv: kv.free(0))
        both.each(lambda kv: kv.compact("tail"))  # the page of nobody may move too
        both.step({1: 1, 2: 1})
        both.step({3: 5, 1: 1})  # reads what the replays wrote
        both.step({3: 1, 1: 2})
        assert both.counts == (4, 7)
        both.step({1: 1, 3: 1}, rows=[1])
        assert both.counts == (5, 8)
        both.step({2: 1})  # its eleventh token
        both.step(dict.fromkeys(range(4, 9), 1))  # five
        assert both.counts == (5, 10)
        both.each(lambda kv: kv.free(8))
        both.step({4: 1, 5: 1, 6: 1, 7: 1})
        assert both.counts == (6, 11)
        recorded, kv = both.ours.recorded, both.ours.kv
        assert recorded is not None and both.eager.recorded is None and kv.num_pages == 17
        kv.integrity()
        assert kv.used_bytes == both.eager.kv.used_bytes and kv.length(PADDING) == 0
        return list(recorded.graphs.recorded)


def test_recorded_decodes_equal_eager_ones() -> None:
    (keys,) = run_mesh((1, 1), decodes, "off")
    assert keys == [(Layout(1, 1), n) for n in (4, 2, 1)]


def test_recorded_decodes_under_the_layout_of_their_tokens() -> None:
    """Up to two tokens tensor parallel; steps of three and four share a size, and each rank records the same."""
    assert run_mesh((1, 2), decodes, Shift.threshold(2, SP)) == [[(SP, 4), (TP, 2), (TP, 1)]] * 2


def of_the_device(mesh: comm.DeviceMesh) -> None:
    """The way of a GPU on Triton's interpreter: one batch for all replays, whose lengths only its tensors say."""
    small = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 16}
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=1, **small)
    with parallelize(model, mesh), pytest.MonkeyPatch.context() as patch, interpreted("attention"):
        patch.setattr(recording, "HOSTS", frozenset())
        both = Both(model, 12, 4, Recording((2,), max_len=16))
        both.step({0: 6, 1: 2}, 1e-4)
        for _ in range(3):
            both.step({0: 1, 1: 1}, 1e-4)
        both.step({1: 1}, 1e-4)
        assert both.counts == (4, 5)
        recorded = both.ours.recorded
        assert recorded is not None
        ((_, batch),) = recorded._batches.items()
        assert batch.kv_lens == (16, 16) and batch.cu_kv.tolist() == [0, 6, 7]


def test_what_is_recorded_knows_no_lengths() -> None:
    run_mesh((1, 1), of_the_device)


def refuses(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    with parallelize(model, mesh), own_errors():
        both = Both(model, 4, 2, Recording((1,), max_len=4))
        both.step({0: 1})
        both.ours.kv.grow(num_pages=9)
        batch = both.ours.kv.batch([0], [1])
        with pytest.raises(ValueError, match="`kv` must stay where it was when the steps were recorded, got one that"):
            both.ours(batch, torch.tensor([1]), [0])
        both = Both(model, 4, 2, Recording((1,), max_len=4))
        batch = both.ours.kv.batch([0], [1])
        both.ours.kv.truncate(0, 0)
        with pytest.raises(
            ValueError, match="`batch` must be made after the last free, truncate or select of request 0"
        ):
            both.ours(batch, torch.tensor([1]), [0])


def test_a_cache_that_moved_and_a_step_that_is_stale_are_refused() -> None:
    run_mesh((1, 1), refuses)


@own_errors()
def test_bad_recordings_are_refused() -> None:
    for sizes in ((), (0, 1), (2, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"`sizes` must be at least 1 and increasing, got \["):
            Recording(sizes)
    with pytest.raises(ValueError, match="`max_len` must be at least 1, got 0"):
        Recording(max_len=0)
    made: dict[str, Any] = {"modules": [], "group": cast(Any, None)}
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    with pytest.raises(ValueError, match="`recording` must be None where attention does not run on Triton kernels, wh"):
        RecordedDecodes(cast(Any, None), cast(Any, gpu), Recording(), [SP], **made)
    kv = PagedKV(1, 2, 2, 1, 2)
    kv.reserve({"a": 1})
    with pytest.raises(ValueError, match="`kv` must hold no request when steps are recorded, got 1"):
        RecordedDecodes(cast(Any, None), kv, Recording(), [SP], **made)
