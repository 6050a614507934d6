"""Steps as CUDA graphs: one for each layout and number of tokens, over buffers that stay where they are.

A decode step launches hundreds of small kernels and collectives; recorded once, they are launched as one. A graph has
the shapes, the addresses and the host integers of its recording for ever, so a step of n tokens is copied into the
buffers of the next larger size, and the rows that are left over are marked.

Which graphs there are, which are recorded, and which one serves a step are one table, `partition.GraphKeys`. Where an
engine keeps a list for each of the three, they drift apart: recorded graphs that are never found, and steps that look
for graphs which were never recorded. A step that the table has no graph for runs as it is.

Recording belongs here and not to the layers since it is a matter of streams, and since the graph of a step holds its
collectives: all ranks record the same graphs in the same order, and replay the same one. On a CPU nothing is recorded;
the step runs on the same buffers each time, so that all but the recording is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqpar.comm.agreement import agree
from seqpar.comm.stream import CPUStream, Stream, current_stream, follow, new_stream, use_stream
from seqpar.partition import GraphKey, GraphKeys, Layout

__all__ = ["StepGraphs"]

Step = Callable[..., Tensor]


class StepGraphs:
    """A step that is recorded for some layouts and sizes, and called with any.

    Made, it has recorded all its graphs, one after another in one pool of memory; every rank makes it with the same
    arguments. Nothing is differentiated. Calls follow one another on one stream, for the buffers are shared.

    What the step reads besides its inputs must stay where it is (`modules` are checked), and what it works out on the
    host is that of the recording. So attention over a cache may be recorded only where its lengths do not change.
    Batches are to be made before, one for each size.

    Args:
        step: called as `step(layout, real, *inputs)` with all rows of the inputs, on every rank. `real` [T] says which
            of them are tokens; the others are zeros that fill the buffers up. It returns a row for each.
        keys: what to record.
        like: tensors with the dtype, the device and all but the first dim of each input.
        modules: whose parameters and buffers the step reads.
        group: all ranks that take part.

    Attributes:
        replays: steps that a graph has served.
        eager: steps for which there was none.

    Raises:
        TypeError, ValueError: `like` is empty or on several devices; the step returns no tensor with a row for each
            row of the inputs, on some rank, and then on all.
    """

    def __init__(
        self, step: Step, keys: GraphKeys, like: Sequence[Tensor], *, modules: Sequence[nn.Module], group: ProcessGroup
    ) -> None:
        devices = {x.device for x in like}
        if len(devices) != 1:
            raise ValueError(f"`like` must be tensors on one device, got {len(like)} on {len(devices)} devices")
        for module in modules:
            _check_recordable(module)
        self.step, self.keys, self.group = step, keys, group
        self.replays = self.eager = 0
        (self._device,) = devices
        most = max((key.num_tokens for key in keys.keys), default=0)
        with torch.inference_mode(False):  # made in it, they could only ever be written in it
            self._inputs = [x.new_zeros(most, *x.shape[1:]) for x in like]
            self._real = torch.ones(most, dtype=torch.bool, device=self._device)
        self._addresses = [entry for module in modules for entry in _addresses(module)]
        here = current_stream(self._device)
        on_cpu = isinstance(here, CPUStream)
        side = here if on_cpu else new_stream(self._device)
        pool = None if on_cpu else torch.cuda.graph_pool_handle()
        # The largest first: the memory that it needs beside its result serves the others.
        order = sorted(keys.keys, key=lambda key: (-key.num_tokens, key.layout))
        self._graphs = {key: self._record(key, side, pool) for key in order}

    @property
    def recorded(self) -> tuple[GraphKey, ...]:
        """The graphs there are, in the order of their recording."""
        return tuple(self._graphs)

    @torch.no_grad()
    def __call__(self, layout: Layout, *inputs: Tensor) -> Tensor:
        """Run a step under `layout`.

        In:    each input [T, ...], all rows on every rank.
        Out:   what the step returns for them, [T, ...], the caller's own.
        Comm:  the step's, by the same graph on every rank.

        Raises:
            TypeError, ValueError: inputs that are not like those announced; parameters that have moved since the
                recording; a step that returns no row for each row. Each rank raises for itself, since a replay waits
                for no other: where only some ranks do, the rest wait until their group's timeout.
        """
        num_tokens = self._check(inputs)
        key = self.keys.key_of(layout, num_tokens)
        if key is None:
            self.eager += 1
            return self._run(layout, torch.ones(num_tokens, dtype=torch.bool, device=self._device), inputs)
        for entry in self._addresses:
            entry.check()
        for buffer, x in zip(self._inputs, inputs, strict=True):
            buffer[:num_tokens].copy_(x)
            buffer[num_tokens : key.num_tokens].zero_()
        self._real[:num_tokens].fill_(True)
        self._real[num_tokens : key.num_tokens].fill_(False)
        self.replays += 1
        return self._graphs[key]()[:num_tokens].clone()

    def _run(self, layout: Layout, real: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        out = self.step(layout, real, *inputs)
        error = _shape_error(out, len(real))
        if error is not None:
            raise error
        return out

    @torch.no_grad()
    def _record(self, key: GraphKey, side: Stream, pool: Any) -> Callable[[], Tensor]:
        """Run a step once, on another stream as it is recorded, and record it: how to run it again."""
        inputs = [buffer[: key.num_tokens] for buffer in self._inputs]
        real = self._real[: key.num_tokens]
        here = current_stream(self._device)
        with use_stream(side):
            follow(here)  # the buffers, allocated there, are zero
            out = self.step(key.layout, real, *inputs)
        follow(side)
        agree(_shape_error(out, key.num_tokens), group=self.group)
        run = partial(self._run, key.layout, real, inputs)
        return run if pool is None else _recorded(run, pool)

    def _check(self, inputs: Sequence[Tensor]) -> int:
        """The rows of the inputs, which are like the buffers."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"`inputs` must be {len(self._inputs)}, as many as `like`, got {len(inputs)}")
        for index, (x, buffer) in enumerate(zip(inputs, self._inputs, strict=True)):
            wanted = (len(inputs[0]), *buffer.shape[1:]), buffer.dtype, buffer.device
            if (tuple(x.shape), x.dtype, x.device) != wanted:
                raise ValueError(
                    f"`inputs[{index}]` must be {list(wanted[0])} {wanted[1]} on {wanted[2]}, as `like` announced and "
                    f"with the rows of the first, got {list(x.shape)} {x.dtype} on {x.device}"
                )
        return len(inputs[0])


class _Address(NamedTuple):
    """Where a parameter or a buffer of a module was when the graphs were recorded."""

    name: str
    owner: dict[str, Tensor | None]
    key: str
    address: int

    def check(self) -> None:
        tensor = self.owner.get(self.key)
        if tensor is None or tensor.data_ptr() != self.address:
            raise ValueError(
                f"`{self.name}` must stay where it was when the graphs were recorded, which read it there, got it "
                "moved or replaced; make new graphs"
            )


def _check_recordable(module: nn.Module) -> None:
    """Refuse a layer that says, by its `unrecorded`, why a graph cannot hold it."""
    for path, child in module.named_modules():
        reason: str | None = getattr(type(child), "unrecorded", None)
        if reason is not None:
            raise ValueError(
                f"`modules` must be layers that a graph can hold, got {type(child).__name__}"
                f"{f' ({path})' if path else ''}, {reason}; run its steps eagerly"
            )


def _addresses(module: nn.Module) -> Iterator[_Address]:
    for path, child in module.named_modules():
        for owner in (child._parameters, child._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield _Address(f"{path}.{key}".removeprefix("."), owner, key, tensor.data_ptr())


def _shape_error(out: object, num_tokens: int) -> TypeError | ValueError | None:
    """What is wrong with the result of a step, whose rows are to be cut off where its tokens end."""
    if not isinstance(out, Tensor):
        return TypeError(f"`step` must return a tensor, got {type(out).__name__}")
    if out.ndim == 0 or len(out) != num_tokens:
        return ValueError(
            f"`step` must return a row for each of the {num_tokens} rows of its inputs, got {list(out.shape)}; gather "
            "them where ranks hold some each"
        )
    return None


def _recorded(run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """`run` as a graph, whose result is the same tensor each time.

    Errors of other threads are not this recording's: NCCL's watchdog asks for events when it likes.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
