"""Decodes as recorded graphs: steps of one token each, over a cache that grows.

A graph keeps the host's integers of its recording for ever, so what changes from step to step is in tensors that stay
where they are: ids, positions, slots, lengths and page tables, a row for each request. The kernels read lengths and
tables there; what the host decides, such as into how many parts keys are split, it decides once for the most tokens
that a request may have (`RaggedBatch.decodes`). A step of n requests is filled up to the next size with requests of one
token in a page that nobody else has.

All else runs as it is: prompts, steps of more requests than the largest size, requests longer than the tables.

On a CPU nothing is recorded: a replay runs the step on the same tensors, with lengths that the host reads there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn

from seqpar.comm import ProcessGroup, StepGraphs
from seqpar.kernels import choose_backend
from seqpar.kv import PagedKV
from seqpar.partition import GraphKeys, Layout, Shift
from seqpar.ragged import RaggedBatch

__all__ = ["RecordedDecodes", "Recording"]

PADDING = ("seqpar", "padding")
"""What the cache knows the requests as that fill steps up."""

HOSTS = frozenset({"cpu"})
"""Devices on which the host reads lengths as a step runs, and so runs it again instead of a recording."""


@dataclass(frozen=True)
class Recording:
    """Which decodes a `Stepper` records.

    Args:
        sizes: numbers of requests, increasing; a step runs as the next one.
        max_len: tokens of a request, cached ones included, up to which its steps are served.

    Raises:
        ValueError: no sizes, one below 1, or not increasing; a length below 1.
    """

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    max_len: int = 4096

    def __post_init__(self) -> None:
        sizes = tuple(self.sizes)
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"`sizes` must be at least 1 and increasing, got {list(sizes)}")
        if self.max_len < 1:
            raise ValueError(f"`max_len` must be at least 1, got {self.max_len}")


Decode = Callable[[Layout, Int64[Tensor, " n"], RaggedBatch], Float[Tensor, "n v"]]


class RecordedDecodes:
    """The decodes of a model over one cache, recorded when this is made, on every rank alike.

    Args:
        decode: the logits of all tokens of a batch, under a layout.
        kv: the cache, of which this takes a page; nothing is held yet.
        recording: what to record.
        layouts: under which steps run, or the rule for that.
        modules: whose parameters `decode` reads.
        group: all ranks.

    Raises:
        ValueError: on a GPU, keys of a dtype that the Triton kernels do not take, which alone read lengths there; a
            cache that holds requests.
    """

    def __init__(
        self,
        decode: Decode,
        kv: PagedKV,
        recording: Recording,
        layouts: Shift | Sequence[Layout],
        *,
        modules: Sequence[nn.Module],
        group: ProcessGroup,
    ) -> None:
        if kv.device.type not in HOSTS and choose_backend("attention", kv.device, kv.dtype) != "triton":
            raise ValueError(
                "`recording` must be None where attention does not run on Triton kernels, which read lengths on the "
                f"device, got keys of {kv.dtype}; or install Triton"
            )
        if kv.ids:
            raise ValueError(f"`kv` must hold no request when steps are recorded, got {len(kv.ids)}")
        self._decode, self._kv, self._max_len = decode, kv, recording.max_len
        self._width = -(-recording.max_len // kv.page_size)
        self._batches: dict[tuple[Layout, int], RaggedBatch] = {}
        kv.reserve({PADDING: 1})
        self._at = self._address()
        sizes = recording.sizes
        keys = GraphKeys.of(layouts, sizes) if isinstance(layouts, Shift) else GraphKeys.every(layouts, sizes)
        longs = torch.empty(0, dtype=torch.int64, device=kv.device)
        ints = torch.empty(0, self._width, dtype=torch.int32, device=kv.device)
        self.graphs = StepGraphs(
            self._step, keys, [longs, longs, longs, ints[:, 0], ints], modules=modules, group=group
        )

    def __call__(self, layout: Layout, batch: RaggedBatch, tokens: Int64[Tensor, " t"]) -> Float[Tensor, "t v"] | None:
        """The logits of all tokens of a step, which the cache counts as appended; None where no graph serves it.

        Raises:
            ValueError: the cache has grown since the recording, or what `StepGraphs` refuses.
        """
        if set(batch.q_lens) != {1} or max(batch.kv_lens) > self._max_len:
            return None
        key = self.graphs.keys.key_of(layout, batch.num_tokens)
        if key is None:
            return None
        if self._address() != self._at:
            raise ValueError("`kv` must stay where it was when the steps were recorded, got one that has grown")
        (page,) = self._kv.pages(PADDING)
        padded = batch.pad_to([key.num_tokens], page=page)
        lens = torch.tensor(padded.kv_lens, dtype=torch.int32)
        lens = lens.pin_memory().to(self._kv.device, non_blocking=True) if tokens.is_cuda else lens
        missing = self._width - padded.page_table.shape[1]
        table = F.pad(padded.page_table, (0, missing))  # or cut off, which no token lies behind
        ids = F.pad(tokens, (0, key.num_tokens - len(tokens)))
        self._kv.count(batch)
        return self.graphs(layout, ids, padded.positions, padded.slots, lens, table)[: len(tokens)]

    def _step(
        self,
        layout: Layout,
        real: Bool[Tensor, " n"],
        tokens: Int64[Tensor, " n"],
        positions: Int64[Tensor, " n"],
        slots: Int64[Tensor, " n"],
        kv_lens: Int32[Tensor, " n"],
        table: Int32[Tensor, "n pages"],
    ) -> Float[Tensor, "n v"]:
        """What is recorded. All rows are tokens to it: steps are filled up before, and a recording has only zeros."""
        kv_lens = kv_lens.clamp(min=1)
        if tokens.device.type in HOSTS:
            tensors = positions, slots, table, self._kv.page_size, self._kv.version
            return self._decode(layout, tokens, RaggedBatch((1,) * len(tokens), tuple(kv_lens.tolist()), *tensors))
        batch = self._batches.get((layout, len(tokens)))
        if batch is None:  # its plans are to be made in the run before the recording
            options = {"version": self._kv.version}
            batch = RaggedBatch.decodes(kv_lens, positions, slots, table, self._kv.page_size, **options)
            self._batches[layout, len(tokens)] = batch
        batch.write_lengths(kv_lens)
        return self._decode(layout, tokens, batch)

    def _address(self) -> int:
        """Where the cache lies; all layers of it move together."""
        return self._kv.layer(0)[0].data_ptr() if self._kv.num_layers else 0
