"""The pictures of the pages that explain a technique: traces of real runs, behind a simulated link.

    torchrun --nproc-per-node 2 benchmarks/timelines.py docs/pictures
    torchrun --nproc-per-node 4 benchmarks/timelines.py docs/pictures

Each number of ranks draws its own. Of several runs the shortest is drawn, since others may use the machine; what is
computed is checked by the suite, not here. Pictures show what goes on beside what, and measure no machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

import seqpar
from seqpar import comm, layers
from seqpar.batching import Budget, DecodeMaximal, PipelineFusion, Request, StallFree, TemporalFusion
from seqpar.kv import PagedKV, StripedKV
from seqpar.partition import HeadMap, Layout, Striping, even_ranges
from seqpar.ragged import RaggedBatch

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-llama"
LINK = comm.LinkCosts(alpha_s=2e-4, bytes_per_s=1e8)


class Scene(NamedTuple):
    """What is drawn.

    Attributes:
        title: what it shows.
        group: the ranks whose lanes it has.
        linked: groups that share the simulated link.
        run: does it once.
        link: its costs.
    """

    title: str
    group: comm.ProcessGroup
    linked: tuple[comm.ProcessGroup, ...]
    run: Callable[[], Any]
    link: comm.LinkCosts = LINK


def stack(groups: comm.Groups, wires: tuple[Any, ...] = (None, None)) -> list[layers.ParallelDecoderLayer]:
    """Decoder layers of 512 dims, one for each wire format."""
    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4)
    heads = HeadMap(8, 4, *groups.layout)
    made = [
        layers.ParallelDecoderLayer.from_module(
            LlamaDecoderLayer(config, index), groups=groups, heads=heads, layer_index=index, wire=wire
        )
        for index, wire in enumerate(wires)
    ]
    layers.name_modules(nn.ModuleList(made))
    return made


def through(made: list[layers.ParallelDecoderLayer], tokens: int, groups: comm.Groups) -> Callable[[], Any]:
    """A prompt through layers, serially."""
    batch = RaggedBatch.prefill([tokens])
    x = torch.randn(even_ranges(tokens, groups.layout.sp)[groups.sp.rank()].size, 512)

    def run() -> None:
        y = x
        for layer in made:
            y = layer(y, batch)

    return run


def tensor_parallel() -> Scene:
    groups = comm.groups(seqpar.init_mesh(tp=2, device="cpu"))
    run = through(stack(groups), 768, groups)
    return Scene("768 tokens through two layers, tp=2: compute, sum, compute, sum", groups.flat, (groups.tp,), run)


def ulysses() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=2, device="cpu"))
    run = through(stack(groups), 768, groups)
    return Scene("768 tokens through two layers, sp=2: heads in, attention, heads back", groups.flat, (groups.sp,), run)


def wire_formats() -> Scene:
    groups = comm.groups(seqpar.init_mesh(tp=2, device="cpu"))
    run = through(stack(groups, (None, "int8")), 768, groups)
    return Scene("tp=2: layer 0 sends float32, layer 1 sends int8", groups.flat, (groups.tp,), run)


def shift() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=2, device="cpu"))
    places = comm.layout_groups(groups)
    made = stack(groups)
    for layer in made:
        for layout, there in places.items():
            layer.add_layout(layout, groups=there)
    own_heads = HeadMap(8, 4, *groups.layout).kv_ranges[groups.flat.rank()].size
    x = torch.randn(128, 512)

    def run() -> None:
        kv = PagedKV.contiguous(2, 1, 256, own_heads, 64)
        for tokens, layout in ((128, Layout(1, 2)), (1, Layout(2, 1)), (1, Layout(2, 1))):
            batch = kv.batch([0], [tokens])
            y = x[slice(*even_ranges(tokens, layout.sp)[places[layout].sp.rank()])]
            for layer in made:
                y = layer(y, batch, kv=kv, layout=layout)

    linked = tuple(there for each in places.values() for there in (each.tp, each.sp) if there.size() > 1)
    title = "128 tokens under Ulysses, then two decodes under tensor parallelism, one cache, one copy of the weights"
    return Scene(title, groups.flat, linked, run)


def three_phase() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=2, device="cpu"))
    heads = HeadMap(8, 4, 1, 2)
    core = layers.PipelinedUlysses(heads, 64, group=groups.sp, head_groups=2, query_chunks=2)
    core.label = "attention"
    batch, mine = RaggedBatch.prefill([2048]), even_ranges(2048, 2)[groups.sp.rank()].size
    qkv = core.pack(*(torch.randn(mine, h, 64) for h in (8, 4, 4)))
    return Scene("2048 tokens, sp=2, in 2 x 2 parts", groups.flat, (groups.sp,), lambda: core(qkv, batch))


def qship() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=2, device="cpu"))
    heads, rank = HeadMap(16, 2, 1, 2), groups.sp.rank()
    core = layers.QShipDecodeAttention(heads, 128, group=groups.sp)
    core.label = "attention"
    context, requests = 6000, 8
    shape = {"num_layers": 1, "num_pages": 6400, "page_size": 16, "num_kv_heads": 2, "head_dim": 128}
    kv = StripedKV(**shape, striping=Striping(2, 8), rank=rank, dtype=torch.float32)
    k, v = torch.randn(2, context, 2, 128)
    for request in range(requests):
        kv.append(0, k, v, kv.batch([request], [context]))
    half = requests // 2
    qkv = core.pack(*(torch.randn(half // 2, h, 128) for h in (16, 2, 2)))

    def run() -> None:
        halves = [kv.batch(range(start, start + half), [1] * half) for start in (0, half)]
        comm.interleave([core.steps(qkv, each, kv=kv) for each in halves], ordered=False)

    link = comm.LinkCosts(5e-4, 1e8)
    title = "decodes of 8 requests over 6000 tokens each, sp=2, two halves by turns"
    return Scene(title, groups.flat, (groups.sp,), run, link)


def moe() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=2, device="cpu"))
    layer = layers.ParallelMoE(512, 512, num_experts=8, top_k=2, groups=groups, experts="ep")
    layer.label = "experts"
    x = torch.randn(256, 512)
    title = "512 tokens to two of eight experts, owned by two ranks, and back"
    return Scene(title, groups.flat, (groups.flat,), lambda: layer(x))


def pipeline() -> Scene:
    mesh = seqpar.init_mesh(pp=2, device="cpu")
    stage = seqpar.hf.load_stage(CHECKPOINT, mesh, num_pages=256, page_size=16, dtype=torch.float32, progress=False)

    def run() -> None:
        loop = PipelineFusion(
            stage,
            stage.kv,
            vocab_size=stage.vocab_size,
            policy=DecodeMaximal(chunk=96),
            budget=Budget(max_tokens=128, max_requests=8),
        )
        for number in range(4):
            loop.add(Request(number, list(range(3, 250)), 3))
        list(loop.run())

    title = "four prompts of 247 tokens in chunks of 96, decodes beside them, two stages"
    return Scene(title, stage.stages.whole, (), run)  # messages take the real way


def batching() -> Scene:
    mesh = seqpar.init_mesh(tp=2, device="cpu")
    model = seqpar.hf.load(CHECKPOINT, mesh, dtype=torch.float32, progress=False)
    stepper = seqpar.hf.Stepper(model, num_pages=64, page_size=16)

    def run() -> None:
        loop = TemporalFusion(
            stepper,
            stepper.kv,
            vocab_size=stepper.vocab_size,
            policy=StallFree(tau=64),
            budget=Budget(max_tokens=64, max_requests=8),
        )
        loop.add(Request("a", list(range(3, 43)), 4))
        loop.step()
        loop.add(Request("b", list(range(3, 103)), 2))
        list(loop.run())

    groups = comm.groups(mesh)
    title = "a decodes while b's prompt is read in chunks: steps of up to 64 tokens, tp=2"
    return Scene(title, groups.flat, (groups.tp,), run)


def placed(core: Any, rows: list[int], heads: tuple[int, int], tokens: int) -> Callable[[], Any]:
    """A layer that places tokens itself, over one prompt."""
    batch = RaggedBatch.prefill([tokens])
    q, k, v = (torch.randn(len(rows), h, 64) for h in (heads[0], heads[1], heads[1]))
    core.label = "attention"
    return lambda: core(q, k, v, batch)


def ring() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=4, device="cpu"))
    core = layers.RingAttention(HeadMap(8, 4), 64, group=groups.sp, method="kv", placement="zigzag")
    run = placed(core, core.rows(RaggedBatch.prefill([2048])), (8, 4), 2048)
    return Scene("2048 tokens in zig-zag slices over four ranks, keys go round", groups.flat, (groups.sp,), run)


def usp() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=4, device="cpu"))
    grid = comm.split_groups(groups.sp, 2)
    core = layers.USPAttention(HeadMap(8, 4), 64, groups=grid, method="kv", placement="zigzag")
    run = placed(core, core.rows(RaggedBatch.prefill([2048])), (8, 4), 2048)
    title = "2048 tokens over a grid of 2 x 2: heads exchanged within a row, keys go round between rows"
    return Scene(title, groups.flat, (grid.inner, grid.outer), run)


def csa() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=4, device="cpu"))
    core = layers.CSAAttention(HeadMap(4, 2), 64, group=groups.sp, policy=layers.TopMass(coverage=0.9))
    run = placed(core, core.rows(RaggedBatch.prefill([1024])), (4, 2), 1024)
    title = "1024 tokens over four ranks, TopMass: sketches, then requests, then blocks"
    return Scene(title, groups.flat, (groups.sp,), run, comm.LinkCosts(2e-4, 4e6))


def csa_certified() -> Scene:
    groups = comm.groups(seqpar.init_mesh(sp=4, device="cpu"))
    core = layers.CSAAttention(HeadMap(4, 2), 64, group=groups.sp, policy=layers.Certified(0.03))
    run = placed(core, core.rows(RaggedBatch.prefill([1024])), (4, 2), 1024)
    title = "1024 tokens over four ranks, certified within 0.03: basis, boxes, bits, requests, more bits"
    return Scene(title, groups.flat, (groups.sp,), run, comm.LinkCosts(2e-4, 4e6))


SCENES: dict[int, tuple[Callable[[], Scene], ...]] = {
    2: (tensor_parallel, ulysses, wire_formats, shift, three_phase, qship, moe, pipeline, batching),
    4: (ring, usp, csa, csa_certified),
}


@torch.no_grad()
def draw(scene: Scene, path: Path, repeats: int) -> None:
    """Trace some runs and draw the shortest."""
    link = comm.SimulatedLink(*scene.link)
    best: tuple[float, comm.Trace] | None = None
    for number in range(repeats + 1):  # the first one warms up
        comm.all_reduce(torch.ones(1), group=scene.group)  # so that all begin together
        with ExitStack() as ways, comm.trace() as seen:
            for group in scene.linked:
                ways.enter_context(link.on(group))
            scene.run()
        whole = seen.gather(group=scene.group)
        span_s = whole.report().span_s
        if number and (best is None or span_s < best[0]):
            best = span_s, whole
    if best is not None and scene.group.rank() == 0:
        best[1].plot(path, title=scene.title)
        print(f"{path}: {1e3 * best[0]:.1f} ms", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--only", nargs="*", help="names of some of them")
    parser.add_argument("--repeats", type=int, default=30, help="runs of which the shortest is drawn")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for make in SCENES.get(int(os.environ.get("WORLD_SIZE", "1")), ()):
        name = make.__name__.replace("_", "-")
        if options.only is None or name in options.only:
            torch.manual_seed(0)
            draw(make(), options.folder / f"{name}.png", options.repeats)


if __name__ == "__main__":
    main()
