"""What the wire formats cost in accuracy and save in bytes: numbers without a clock, the same on any machine.

Bytes: each collective and reshard of a bfloat16 tensor [2048, 4096] with heads of 128, as `comm.record()` counts them,
over those without a format. Every result is checked against the bound that `seqpar.kernels.quantize` states.

Errors: the bundled model reads held-out source in float32 under tensor parallelism; each layer's attention and MLP sum
is formed from the ranks' own summands with and without a format, and the difference taken relative to the sum, in L2.
The same for q, k, v on their way to the heads under sequence parallelism.

Quality: greedy tokens for the demo's prompts, the share of held-out positions whose likeliest token stays, and the
loss, by a model whose layers send everything in the format. Without one, tokens must be the unswapped model's.

Held-out source is that of the running Python's standard library: `examples/train_tiny.py` has the split.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Row, WrongResultError, launch, meta, parser, report
from torch import Tensor

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "tiny-llama"
FORMATS = ("int8", "fp8")
CONTEXT = 1024
PACKAGES = ("seqpar", "torch", "transformers")
STEP = {"int8": 1 / 239, "fp8": 1 / 16}  # the stated error of one rounding, in units of the group's largest


class Errors(NamedTuple):
    """Relative L2 errors of one layout and format, by place."""

    ranks: int
    wire: str
    by_place: dict[str, float]


class Quality(NamedTuple):
    """What a model that sends in a format says: tokens for each prompt, likeliest tokens, nats per token."""

    layout: str
    wire: str | None
    tokens: list[list[int]]
    likeliest: Tensor
    loss: float


# Bytes.


def bytes_of_faces(rows: int, width: int) -> dict[str, float]:
    """Bytes with the format that takes more (int8), over bytes without one, by collective."""
    from seqpar import comm, init_mesh
    from seqpar.partition import even_ranges

    group = comm.groups(init_mesh(sp=torch.distributed.get_world_size())).sp
    p, rank = group.size(), group.rank()
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rank)).bfloat16()
    tall = x.view(p, rows // p, width // p, p).transpose(1, 3).reshape(rows * p, width // p)[:rows]
    sizes = [rows // p] * p
    heads = {"tokens": sizes, "head_dim": 128, "group": group}
    faces: dict[str, Callable[..., Tensor]] = {
        "all_reduce": partial(comm.all_reduce, x, group=group),
        "reduce_scatter": partial(comm.reduce_scatter, x, group=group),
        "all_gather": partial(comm.all_gather, x, group=group),
        "all_to_all": partial(comm.all_to_all, x, group=group, send_sizes=sizes, recv_sizes=sizes),
        "seq_to_heads": partial(
            comm.seq_to_heads, x[: rows // p], columns=[[r] for r in even_ranges(width, p)], **heads
        ),
        "heads_to_seq": partial(comm.heads_to_seq, tall, widths=[width // p] * p, **heads),
    }
    found: dict[str, float] = {}
    for name, call in faces.items():
        with comm.record() as exact:
            want = call()
        for wire in FORMATS:
            with comm.record() as coded:
                got = call(wire=wire)
            sums = p if "reduce" in name else 1
            # p summands and, of more than two, their sum are rounded; bfloat16 rounds the results on both sides
            bound = (sums * STEP[wire] + (p > 2 and name == "all_reduce") * sums * STEP[wire]) * x.abs().max() + 2**-6
            if (got.float() - want.float()).abs().max() > bound * max(1, want.float().abs().max() / x.abs().max()):
                raise WrongResultError(f"{name} in {wire} on {p} ranks: error above the stated bound {bound:.3f}")
            found[name] = max(found.get(name, 0.0), coded.total.sent_bytes / exact.total.num_bytes)
    return found


# Errors on activations.


def errors_on_activations(tp: int, sp: int, text: Tensor) -> list[Errors]:
    """The bundled model reads `text`; every exchange of its layers is repeated in each format."""
    import seqpar
    from seqpar import comm
    from seqpar.partition import even_split

    mesh = seqpar.init_mesh(tp=tp, sp=sp)
    groups = comm.groups(mesh)
    model = seqpar.hf.load(CHECKPOINT, mesh, dtype=torch.float32, progress=False)
    found: dict[str, dict[str, float]] = {wire: {} for wire in FORMATS}

    def note(place: str, call: Callable[..., Tensor]) -> None:
        want = call()
        for wire in FORMATS:
            norms = torch.stack([(call(wire=wire) - want).square().sum(), want.square().sum()])
            error, whole = comm.all_reduce(norms, group=groups.flat)
            found[wire][place] = float((error / whole).sqrt())

    def at_sum(place: str, linear: Any, args: tuple[Tensor, ...]) -> None:
        note(place, partial(comm.all_reduce, F.linear(args[0], linear.weight), group=groups.tp))

    def at_heads(place: str, core: Any, args: tuple[Any, ...]) -> None:
        exchange = core.exchanges[None]
        tokens = even_split(args[1].num_tokens, sp)
        call = partial(comm.seq_to_heads, args[0], columns=exchange.columns, tokens=tokens, head_dim=core.head_dim)
        note(place, partial(call, group=groups.sp))

    for index, layer in enumerate(model.model.layers):
        if tp > 1:
            layer.self_attn.o_proj.register_forward_pre_hook(partial(at_sum, f"attention {index}"))
            layer.mlp.down_proj.register_forward_pre_hook(partial(at_sum, f"MLP {index}"))
        else:
            layer.self_attn.core.register_forward_pre_hook(partial(at_heads, f"q, k, v {index}"))
    with torch.inference_mode():
        model(text)
    return [Errors(tp * sp, wire, by_place) for wire, by_place in found.items()]


# Quality.


def quality(tp: int, sp: int, wire: str | None, prompts: Any, new_tokens: int, windows: Tensor) -> Quality:
    """Generate, and score the windows one by one."""
    import seqpar
    from seqpar import comm

    mesh = seqpar.init_mesh(tp=tp, sp=sp)
    model = seqpar.hf.load(CHECKPOINT, mesh, dtype=torch.float32, progress=False, wire=wire)
    tokens, likeliest, loss = _scores(model, prompts, new_tokens, windows)
    mine = torch.cat([torch.tensor(tokens).flatten(), likeliest])
    everyone = comm.all_gather(mine[None], group=comm.groups(mesh).flat)
    if (everyone != mine).any():
        raise WrongResultError(f"tp={tp} sp={sp} {wire}: ranks say different things")
    if wire is None:
        from transformers import AutoModelForCausalLM

        with quiet():
            whole = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        if _generate(whole, prompts, new_tokens) != tokens:
            raise WrongResultError(f"tp={tp} sp={sp}: other tokens than the unswapped model's without a format")
    return Quality(f"tp={tp}" if tp > 1 else f"sp={sp}", wire, tokens, likeliest, loss)


@torch.inference_mode()
def _scores(model: Any, prompts: Any, new_tokens: int, windows: Tensor) -> tuple[list[list[int]], Tensor, float]:
    likeliest, losses = [], []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        likeliest.append(logits.argmax(-1))
        losses.append(F.cross_entropy(logits.double(), window[1:], reduction="mean"))
    return _generate(model, prompts, new_tokens), torch.cat(likeliest), float(torch.stack(losses).mean())


def _generate(model: Any, prompts: Any, new_tokens: int) -> list[list[int]]:
    out = model.generate(**prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return out[:, -new_tokens:].tolist()  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Without Transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def two_ranks(text: Tensor, prompts: Any, new_tokens: int, windows: Tensor) -> tuple[Any, ...]:
    ratios = bytes_of_faces(2048, 4096)
    errors = [*errors_on_activations(2, 1, text), *errors_on_activations(1, 2, text)]
    found = [
        quality(*layout, wire, prompts, new_tokens, windows) for layout in ((2, 1), (1, 2)) for wire in (None, *FORMATS)
    ]
    return ratios, errors, found


def four_ranks(text: Tensor) -> tuple[Any, ...]:
    return bytes_of_faces(2048, 4096), errors_on_activations(4, 1, text)


# The report.


def rows_of(ratios: dict[int, dict[str, float]], errors: Sequence[Errors], found: Sequence[Quality]) -> list[Row]:
    rows = []
    for p, by_face in ratios.items():
        for name, value in by_face.items():
            rows.append(Row(f"{name}, {p} ranks: bytes ÷ bfloat16's", value, "x", 0.53, value <= 0.53))
    for entry in errors:
        what = "q, k, v to heads" if next(iter(entry.by_place)).startswith("q") else "sums of activations"
        worst, mean = max(entry.by_place.values()), sum(entry.by_place.values()) / len(entry.by_place)
        target = 1.0 if entry.wire == "int8" else None
        name = f"{what}, {entry.wire}, {entry.ranks} ranks: relative error"
        ok = None if target is None else 100 * worst <= target
        rows.append(Row(f"{name}, worst layer", 100 * worst, "%", target, ok))
        rows.append(Row(f"{name}, mean", 100 * mean, "%"))
    exact = {entry.layout: entry for entry in found if entry.wire is None}
    for entry in found:
        base = exact[entry.layout]
        if entry.wire is None:
            rows.append(Row(f"{entry.layout}: held-out loss, nats per token", entry.loss, "nats"))
            continue
        stays = torch.tensor(entry.tokens) == torch.tensor(base.tokens)
        same = (entry.likeliest == base.likeliest).double().mean().item()
        name = f"{entry.layout} {entry.wire}"
        rows += [
            Row(f"{name}: greedy tokens that stay, of {stays.numel()}", int(stays.sum()), "tokens"),
            Row(f"{name}: likeliest token that stays, held-out text", 100 * same, "%"),
            Row(f"{name}: change of held-out loss", 1000 * (entry.loss - base.loss), "mnats"),
            Row(f"{name}: change of perplexity", 100 * (torch.tensor(entry.loss - base.loss).exp().item() - 1), "%"),
        ]
    return rows


def draw(path: Path, errors: Sequence[Errors], title: str) -> None:
    """Errors by layer, for each number of ranks and format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for entry in errors:
        sums = not next(iter(entry.by_place)).startswith("q")
        places = list(entry.by_place) if sums else []
        if places:
            axes.plot(
                places,
                [100 * value for value in entry.by_place.values()],
                "o-" if entry.ranks == 2 else "s--",
                color="tab:blue" if entry.wire == "int8" else "tab:orange",
                label=f"{entry.wire}, {entry.ranks} ranks",
            )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_yticks((0.5, 1, 2, 4), ["0.5 %", "1 %", "2 %", "4 %"])
    axes.minorticks_off()
    axes.set_ylabel("relative L2 error of the sum")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(ncols=2, loc="center left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def held_out(tokens: int) -> Tensor:
    """Windows of held-out source, the first token of each being `<s>`."""
    sys.path.insert(0, str(ROOT / "examples"))
    from train_tiny import Corpus
    from transformers import AutoTokenizer

    corpus = Corpus(AutoTokenizer.from_pretrained(CHECKPOINT), held_out=True)
    windows = torch.from_numpy(corpus.ids[: tokens // CONTEXT * CONTEXT].reshape(-1, CONTEXT).copy())
    windows[:, 0] = int(corpus.ids[0])
    return windows


def demo_prompts() -> Any:
    from demo import PROMPTS
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.padding_side = "left"
    return dict(tokenizer(list(PROMPTS), return_tensors="pt", padding=True))


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    windows = held_out(8 * CONTEXT if args.quick else 64 * CONTEXT)
    prompts, new_tokens = demo_prompts(), 16 if args.quick else 64
    ratios, errors, found = launch(2, two_ranks, windows[:1], prompts, new_tokens, windows)
    ratios4, errors4 = launch(4, four_ranks, windows[:1])
    rows = rows_of({2: ratios, 4: ratios4}, [*errors, *errors4], found)
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        model="examples/tiny-llama, float32",
        held_out_tokens=windows.numel(),
        errors={
            f"{e.ranks} ranks, {e.wire}, {place}": v for e in (*errors, *errors4) for place, v in e.by_place.items()
        },
        tokens={f"{q.layout} {q.wire}": q.tokens for q in found},
    )
    title = "wire formats on the bundled model: bytes, errors, tokens and loss"
    plot, args.plot = args.plot, None
    report(args, about, rows, title)
    if plot:
        draw(plot, [*errors, *errors4], "error of the layers' sums, bundled model on held-out source")


if __name__ == "__main__":
    main()
