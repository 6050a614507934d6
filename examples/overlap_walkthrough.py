# %% [markdown]
# # Overlap, step by step
#
# <!-- ranks: 2 -->
#
# What hides behind what, in pictures of real runs: three decoder layers, tensor-parallel over two ranks, behind a
# link that is made slow. The file `examples/overlap_walkthrough.py` is this page in cells; it draws the pictures
# anew:
#
#     PICTURES=docs/pictures torchrun --nproc-per-node 2 examples/overlap_walkthrough.py
#
# ## A model, and a slow link
#
# Any layer with the children of a Llama layer can be sliced. Every rank draws the same one and keeps its part. The
# link is simulated: results really travel, but none arrives before it would at 200 us and 100 MB/s.

# %%
import os
import tempfile
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

import seqpar
from seqpar import comm, layers, plan
from seqpar.kv import PagedKV
from seqpar.partition import HeadMap

torch.set_num_threads(1)
groups = comm.groups(seqpar.init_mesh(tp=2, device="cpu"))
config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4)
heads = HeadMap(8, 4, tp=2, sp=1)
tokens, folder = 384, Path(os.environ.get("PICTURES") or tempfile.mkdtemp())
link = comm.SimulatedLink(alpha_s=2e-4, bytes_per_s=1e8)


def build(wire=None):
    torch.manual_seed(0)
    made = [
        layers.ParallelDecoderLayer.from_module(
            LlamaDecoderLayer(config, index), groups=groups, heads=heads, layer_index=index, wire=wire
        )
        for index in range(3)
    ]
    layers.name_modules(torch.nn.ModuleList(made))
    return made


stack, x = build(), torch.randn(tokens, 512)

# %% [markdown]
# ## A program, and who drives it
#
# A layer communicates by `yield`: it hands out a collective that is in flight, and goes on when it is sent the
# result. A stack of layers is then a program, and so is a stack over a part of the prompt. `comm.interleave` drives
# any number of programs by turns. What they share is the cache: part 2 reads what part 1 appended.


# %%
def program(made, x, batch, kv):
    for layer in made:
        x = yield from comm.call(layer, x, batch, kv=kv)
    return x


@torch.no_grad()
def run(cuts=(), made=stack):
    """The prompt, cut at some tokens: its output, and the shorter of two traces of both ranks."""
    traces = []
    for _ in range(2):
        kv = PagedKV.contiguous(3, 1, tokens, heads.kv_ranges[groups.flat.rank()].size, 64)
        batch = kv.batch(["prompt"], [tokens])
        parts = zip(x.tensor_split(list(cuts)), batch.split(list(cuts)), strict=True)
        with link.on(groups.tp), comm.trace() as seen:
            out = torch.cat(comm.interleave([program(made, *part, kv) for part in parts]))
        traces.append(seen.gather(group=groups.flat))
    return out, min(traces, key=lambda trace: trace.report().span_s)


def show(trace, name, title):
    """Rank 0 draws; the report is of both."""
    if groups.flat.rank() == 0:
        trace.plot(folder / f"{name}.png", title=title)
    report = trace.report()
    print(f"{title}: {report.span_s * 1e3:.0f} ms, of the communication {report.overlap_ratio:.0%} is hidden")
    return report


# %% [markdown]
# ## Serial: everything waits
#
# One program, so nobody computes while a sum travels. Hatched is waiting: six sums in three layers, and none hidden.

# %%
whole, trace = run()
show(trace, "walkthrough-serial", "whole")
assert len([i for i in trace.intervals if i.kind == "comm" and i.rank == 0]) == 6

# %% [markdown]
# ![three layers, serially](../docs/pictures/walkthrough-serial.png)
#
# ## Two halves by turns: ISO
#
# Cut in the middle. While the sum of one half is on the link, the other half computes. Nothing else changes: the same
# kernels, the same bytes in twice as many messages, and the same result up to rounding.

# %%
halves, trace = run([tokens // 2])
traces = {"float32": trace}
show(trace, "walkthrough-two", "two halves")
torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-4)
comm.check_schedule(trace)  # replays the trace: every edge that must hold does

# %% [markdown]
# ![three layers, two halves by turns](../docs/pictures/walkthrough-two.png)
#
# `check_schedule` is the proof that the picture shows what it should: each launch comes before the other's compute,
# each half waits only for its own sum, and the second half attends in a layer only after the first has appended its
# keys there.
#
# ## Four quarters
#
# More parts leave less exposed at both ends, and let a sum lag behind by a turn. They also read all weights more
# often, and pay the latency of each sum again.

# %%
quarters, trace = run([tokens // 4, tokens // 2, 3 * tokens // 4])
show(trace, "walkthrough-four", "four quarters")
torch.testing.assert_close(quarters, whole, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ![three layers, four quarters by turns](../docs/pictures/walkthrough-four.png)
#
# ## Fewer bytes
#
# Overlap hides a transfer, a wire format shortens it, and both compose: in int8 a quarter of float32's bytes travel,
# and sums err by less than a hundredth ([wire formats](wire-formats.md)).

# %%
short, trace = run([tokens // 2], build(wire="int8"))
traces["int8"] = trace
assert (short - whole).norm() < 0.02 * whole.norm()
sent = {name: sum(i.num_bytes for i in each.intervals if i.kind == "comm") for name, each in traces.items()}
assert sent["int8"] < 0.3 * sent["float32"]

# %% [markdown]
# ## Let it be decided
#
# Which of these is best depends on the machine and on the prompt. `plan.calibrate_layers` measures a layer and its
# sums on the ranks at hand, and `plan.overlap` weighs every cut with that, and says why ([planning
# overlap](plan-overlap.md)). With a Hugging Face model this is `overlap="auto"`.

# %%
with link.on(groups.tp):
    costs = plan.calibrate_layers(stack[:1], group=groups.flat, tokens=(64, 192), rounds=2)
choice = plan.overlap(costs, tokens, num_layers=3)
assert choice.predicted_s <= choice.serial_s  # else it says to run whole
if groups.flat.rank() == 0:
    print(choice.explain())
    print(f"pictures are in {folder}")
