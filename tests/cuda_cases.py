"""What the CUDA tests run eagerly, in graphs and under PyTorch's sanitizer; a CPU runs it too (`test_cuda_cases.py`).

Each case is a function of a group of one rank and a matrix [48, 6], and returns that matrix anew. To run all of them
under the sanitizer: `python -m tests.cuda_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

import torch
from torch import Tensor

from seqpar import comm
from seqpar.comm import ProcessGroup, collectives, differentiable
from seqpar.layers import ParallelDecoderLayer
from seqpar.partition import GraphKeys, HeadMap, Layout, Range, even_ranges
from seqpar.ragged import RaggedBatch
from tests.layers.reference import DecoderLayer, rope

Case = Callable[[ProcessGroup, Tensor], Tensor]
Start = Callable[[ProcessGroup, Tensor], comm.Handle]

ROWS, COLUMNS = 48, 6


def link(alpha_s: float = 0.0, *, sm: int = 1) -> comm.SimulatedLink:
    """A link that makes a group of one rank launch something."""
    return comm.SimulatedLink(alpha_s, inf, sm=sm, ranks=8)


# Handles, as the faces of a group of one launch them on a link that takes it for eight.

STARTS: dict[str, Start] = {
    "all_reduce": lambda g, x: comm.all_reduce_async(x, group=g),
    "all_gather": lambda g, x: comm.all_gather_async(x, group=g),
    "reduce_scatter": lambda g, x: comm.reduce_scatter_async(x, group=g),
    "all_to_all": lambda g, x: comm.all_to_all_async(x, group=g, send_sizes=[ROWS], recv_sizes=[ROWS]),
    "broadcast": lambda g, x: comm.broadcast_async(x, src=0, group=g),
    "reduce": lambda g, x: collectives.reduce_async(x, dst=0, group=g),
    "send_recv": lambda g, x: comm.send_recv_async(x, dst=0, src=0, group=g),
}

# Handles of what the backend does, below the faces, which a group of one does not reach.


def _own_all_reduce(g: ProcessGroup, x: Tensor) -> comm.Handle:
    out = x.clone()
    return collectives._launched("all_reduce", "", g, lambda: g.allreduce([out]), lambda: out, (out,), 0)


def _own_broadcast(g: ProcessGroup, x: Tensor) -> comm.Handle:
    out = x.clone()
    moved = collectives._as_bytes(out)
    return collectives._launched("broadcast", "", g, lambda: g.broadcast(moved, 0), lambda: out, (out,), 0)


def _own_exchange(g: ProcessGroup, x: Tensor) -> comm.Handle:
    flat, out = x.reshape(-1), torch.empty_like(x)
    size = [flat.numel()]
    return collectives.exchange("all_to_all", "", g, (flat, size), (out.view(-1), size), lambda: out)


def _own_gather(g: ProcessGroup, x: Tensor) -> comm.Handle:
    flat = x.reshape(-1)
    return collectives._gather_parts("all_gather", "", g, flat, [flat.numel()], lambda flat: flat.view(x.shape))


def _own_reduce_scatter(g: ProcessGroup, x: Tensor) -> comm.Handle:
    flat = x.reshape(-1)
    return collectives._reduce_parts("reduce_scatter", "", g, flat, [flat.numel()]).then(lambda p: p.view(x.shape))


BACKEND: dict[str, Start] = {
    "backend all_reduce": _own_all_reduce,
    "backend broadcast": _own_broadcast,
    "backend exchange": _own_exchange,
    "backend gather": _own_gather,
    "backend reduce_scatter": _own_reduce_scatter,
}


# Programs.


def _waited(start: Start) -> Case:
    return lambda g, x: start(g, x * 1).wait() * 1


def _plain(face: Callable[..., Tensor], **options: object) -> Case:
    return lambda g, x: face(x * 1, group=g, **options) * 1


def program(g: ProcessGroup, x: Tensor, layers: int) -> comm.Steps[Tensor]:
    """Products with a sum after each, and a mark before every second; all numbers stay whole."""
    for layer in range(layers):
        if layer % 2:
            yield comm.Mark(layer)
        partial = x @ torch.eye(COLUMNS, device=x.device, dtype=x.dtype)
        x = yield from comm.all_reduce_steps(partial, group=g, label=f"layer {layer}")
    return x


def _interleaved(chunks: int) -> Case:
    def case(g: ProcessGroup, x: Tensor) -> Tensor:
        parts = [x[a:b] for a, b in even_ranges(ROWS, chunks)]
        return torch.cat(comm.interleave([program(g, part, 4) for part in parts]))

    return case


CASES: dict[str, Case] = {
    **{name: _waited(start) for name, start in (STARTS | BACKEND).items()},
    "all_reduce face": _plain(comm.all_reduce),
    "all_gather face": _plain(comm.all_gather),
    "reduce_scatter face": _plain(comm.reduce_scatter),
    "all_to_all face": _plain(comm.all_to_all, send_sizes=[ROWS], recv_sizes=[ROWS]),
    "broadcast face": _plain(comm.broadcast, src=0),
    "reduce face": _plain(differentiable._reduce, dst=0),
    "send_recv face": _plain(comm.send_recv, dst=0, src=0),
    "seq_to_heads": _plain(comm.seq_to_heads, columns=[[Range(0, COLUMNS)]], tokens=[ROWS]),
    "heads_to_seq": _plain(comm.heads_to_seq, widths=[COLUMNS], tokens=[ROWS]),
    "serial": lambda g, x: comm.run(program(g, x, 4)),
    **{f"interleave {chunks}": _interleaved(chunks) for chunks in (2, 3, 4)},
}


def inputs(device: torch.device | str) -> Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32, device=device).view(ROWS, COLUMNS)


def group_of_one(device: str) -> ProcessGroup:
    return comm.groups(comm.init_mesh(1, 1, device)).tp


@contextmanager
def on_another_stream(device: str) -> Iterator[None]:
    """What is issued inside comes before what is issued after it; of what came before, it waits for nothing."""
    if device == "cpu":
        yield
        return
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def check_all(device: str) -> list[str]:
    """Run every case, and wait for every handle on another stream; the names of what ran."""
    group, x, ran = group_of_one(device), inputs(device), list[str]()
    with link(1e-5).on(group):
        for name, case in CASES.items():
            assert torch.equal(case(group, x), inputs(device)), name
            ran.append(name)
        # Not what NCCL launches: the sanitizer believes that it ends on the stream that launched it, which is too late.
        for name, start in STARTS.items():
            handle = start(group, x * 1)
            with on_another_stream(device):  # which nothing but the handle orders after the launch
                out = handle.wait() * 1
            assert torch.equal(out, inputs(device)), name
            ran.append(f"{name}, waited for elsewhere")
    assert torch.equal(x, inputs(device))
    return ran


def check_graphs(device: str) -> tuple[int, int, int]:
    """Prompts through a decoder layer by recorded graphs: bit for bit what the step makes of the same buffers eagerly.

    Returns how many steps graphs served, how many they did not, and how often the step was called for all of that.
    """
    torch.manual_seed(3)
    groups, one, calls = comm.groups(comm.init_mesh(1, 1, device)), Layout(1, 1), 0
    source = DecoderLayer(64, 8, 2, 16, 96).to(device).requires_grad_(False)
    layer = ParallelDecoderLayer.from_module(source, groups=groups, heads=HeadMap(8, 2))
    batches = {n: RaggedBatch.prefill([n], device=device) for n in (4, 16, 17)}
    tables = {n: [table.float().to(device) for table in rope(torch.arange(n), 16)] for n in batches}

    def step(layout: Layout, real: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return layer(x, batches[len(x)], *tables[len(x)], layout=layout) * real[:, None]

    keys = GraphKeys.every([one], [4, 16])
    with link(1e-5).on(groups.flat), torch.no_grad():
        graphs = comm.StepGraphs(step, keys, [torch.empty(0, 64, device=device)], modules=[layer], group=groups.flat)
        pairs = []
        for n in (3, 16, 4, 9, 17, 1):
            x = torch.randn(n, 64, device=device)
            key, before = keys.key_of(one, n), calls
            out = graphs(one, x)
            counted = calls - before
            rows = n if key is None else key.num_tokens
            padded = torch.cat([x, x.new_zeros(rows - n, 64)])
            pairs.append((out, step(one, torch.arange(rows, device=device) < n, padded)[:n]))
            calls = before + counted
    assert all(torch.equal(*pair) for pair in pairs)
    return graphs.replays, graphs.eager, calls


def check_decodes(device: str) -> tuple[int, int]:
    """Decodes over a cache that grows, by recorded steps of the whole model and eagerly: the same tokens.

    Returns how many steps graphs served, and how many there were. Sums of a step that is filled up may be added in
    another order, so logits are compared to within a few roundings.
    """
    from seqpar import hf
    from tests.hf.tiny import tiny_model

    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}
    model = tiny_model("llama", dtype=torch.float32, **small).to(device)
    with hf.parallelize(model, comm.init_mesh(1, 1, device)):
        record = hf.Recording((1, 2, 4), max_len=40)
        steppers = [hf.Stepper(model, num_pages=24, page_size=4, recording=each) for each in (record, None)]
        last = torch.arange(1, 4, device=device)
        live = {0: 9, 1: 1, 2: 5}
        for step in range(12):
            found = []
            for stepper in steppers:
                batch = stepper.kv.batch(list(live), list(live.values()))
                tokens = last if step else torch.arange(sum(live.values()), device=device)
                found.append(stepper(batch, tokens, batch.last_idx.tolist()))
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
            last, live = found[1].argmax(1), dict.fromkeys(live, 1)
            if step == 6:
                last, live = last[:2], {0: 1, 1: 1}
        recorded = steppers[0].recorded
        assert recorded is not None and torch.equal(found[0].argmax(1), last)
        return recorded.graphs.replays, steppers[0].calls


def race() -> Tensor:
    """What the sanitizer must find, or it sees nothing: a value used on a stream that does not wait for it."""
    x = inputs("cuda") * 2
    with torch.cuda.stream(torch.cuda.Stream()):
        return x * 3


def main() -> None:
    """All cases under the sanitizer."""
    from torch.cuda import _sanitizer

    group_of_one("cuda")
    torch.cuda.synchronize()
    _sanitizer.enable_cuda_sanitizer()
    print("\n".join(check_all("cuda")))
    torch.cuda.synchronize()
    try:
        race()
    except _sanitizer.CUDASanitizerErrors:
        print("the race was found")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
