"""What communication-efficient sparse attention sends, and what it does to a model that has something to find.

The bundled model reads held-out source with retrieval lines on 4 gloo ranks, a contiguous slice of the tokens each,
through the layers themselves: `RingAttention` (dense) and `CSAAttention` with each policy. Two views:

* Heads. The queries, keys and values of a dense reading, one layer and KV head (with its query heads) at a time: bytes,
  and for every query the error |O - O'| (L2, against float64) in units of the largest |v| of its head, beside the
  certificate where there is one. The dense row is what rounding the output to bfloat16 costs.
* The model. All its layers read by a policy, so that errors go on: bytes, KL divergence of the next token from the
  dense reading's, perplexity on tokens of source, retrieval by distance, and retrieval by decode steps after it.

Bytes are all that `comm.record()` counts on all ranks, over those of the dense exchange: bfloat16 keys and values of
every slice, to every later rank. That is what a pass-KV ring sends under a causal mask (checked).

A tensor-parallel quarter of a Llama-8B layer with random weights gives bytes for heads of 128. Speeds are not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Row, WrongResultError, launch, meta, parser, progress, report
from reading import Heads, Read, Reader, Text, Truth, draw, gather, truth
from torch import Tensor

RANKS = 4
LENGTHS = (1024, 2048, 4096, 8192)
TOKENS, FEWER = 16_384, 4096  # that the model reads at lengths of targets, and at others
HEAD_TEXTS = 1  # of each length, in which attention is looked at head by head, and decode follows
SHAPE_TOKENS = 4096
THETA = {32: 1e6, 128: 5e5}  # of the rotary embedding, by the size of heads: the bundled model's and a Llama-8B's
PACKAGES = ("seqpar", "torch", "transformers")
CERTIFIED_TARGETS = {0.03: 0.45, 0.01: 0.60}  # of the dense bytes
TOPMASS_BYTES, TOPMASS_POINTS = 0.25, 1.0
LONG = 4096  # targets are of texts at least so long


class Method(NamedTuple):
    """A policy by name; None is the exact ring."""

    name: str
    family: str
    policy: Any | None
    epsilon: float | None = None


class Case(NamedTuple):
    """One layer and KV head of one text; errors and certificates in units of the head's largest |v|."""

    length: int
    text: int
    layer: int
    head: int
    method: str
    bytes_ratio: float
    worst: float
    p99: float
    mean: float
    relative: float  # L2, of the output
    certificate: float | None  # the largest
    broken: int  # queries whose error is above their certificate
    rounds: int


class Sharpness(NamedTuple):
    """How the queries of one layer and KV head attend: medians over those that have remote keys."""

    length: int
    text: int
    layer: int
    head: int
    effective: float  # keys, e to the entropy
    remote: float  # share of the mass
    remote_p90: float
    largest: float  # score


class Reading(NamedTuple):
    """All texts of one length, read by the whole model; `dense_loss` is of the same ones."""

    length: int
    method: str
    tokens: int
    dense_loss: float
    bytes_ratio: float
    kl: float  # nats per token
    loss: float  # nats per token of source
    same: float  # share of likeliest tokens that are the dense ones
    retrieval: dict[int, tuple[int, int]]  # by distance: hits, asked
    decode: tuple[int, int]


class Found(NamedTuple):
    """All that is measured."""

    cases: list[Case]
    sharpness: list[Sharpness]
    readings: list[Reading]
    shapes: list[Case]


def methods(quick: bool) -> list[Method]:
    """The dense exchange first."""
    from seqpar.layers.csa import Certified, Strided, TopMass

    found = [Method("dense", "dense", None)]
    found.append(Method("Strided, as released, 1/4", "as released", Strided(((1, 1), (4, 4)), faithful=True)))
    for r in (4,) if quick else (2, 4, 8):
        found.append(Method(f"Strided, 1/{r}", "Strided", Strided(((4, r),))))
    for coverage in (0.9,) if quick else (0.8, 0.9, 0.95, 0.97, 0.99):
        found.append(Method(f"TopMass({coverage})", "TopMass", TopMass(coverage)))
    for epsilon in (0.03, 0.0) if quick else (0.1, 0.03, 0.01, 0.001, 0.0):
        found.append(Method(f"Certified({epsilon:g})", "Certified", Certified(epsilon), epsilon))
    return found


# Bytes.


def dense_bytes(tokens: int, kv_heads: int, head_dim: int, ranks: int = RANKS) -> int:
    """Keys and values in bfloat16 of every contiguous slice, sent to every later rank."""
    from seqpar.partition import even_split

    sends = [size * (ranks - 1 - rank) for rank, size in enumerate(even_split(tokens, ranks))]
    return sum(sends) * kv_heads * head_dim * 2 * 2


def core_of(method: Method, heads: int, kv_heads: int, head_dim: int) -> Any:
    """The layer itself, over all ranks."""
    from seqpar import layers
    from seqpar.kernels import RopeConfig
    from seqpar.partition import HeadMap

    options: dict[str, Any] = {"group": dist.group.WORLD, "placement": "contiguous"}
    if method.policy is None:
        return layers.RingAttention(HeadMap(heads, kv_heads), head_dim, method="kv", **options)
    policy = method.policy
    if method.epsilon is not None:
        policy = replace(policy, rope=RopeConfig(head_dim, rope_theta=THETA[head_dim]))
    return layers.CSAAttention(HeadMap(heads, kv_heads), head_dim, policy=policy, **options)


class Answer(NamedTuple):
    """Attention by a core, and what all ranks sent for it."""

    out: Tensor
    bound: Tensor | None
    sent: int
    rounds: int


def attend(core: Any, heads: Heads, batch: Any) -> Answer:
    """Attend once; what a layer says that it sent must be what was recorded."""
    from seqpar import comm, layers

    with comm.record() as recorded:
        if isinstance(core, layers.RingAttention):
            found = Answer(core(*heads, batch), None, recorded.total.sent_bytes, core.group.size() - 1)
        else:
            result = core.attend(*heads, batch)
            found = Answer(result.out, result.bound, result.sent_bytes, result.rounds)
    if found.sent != recorded.total.sent_bytes:
        raise WrongResultError(f"{core.policy}: says {found.sent} bytes, sent {recorded.total.sent_bytes}")
    return found._replace(sent=int(over_ranks(torch.tensor([found.sent]))[0]))


def over_ranks(numbers: Tensor) -> Tensor:
    """The sum."""
    dist.all_reduce(numbers)
    return numbers


# Heads.


def case_of(where: tuple[int, int, int, int], method: Method, heads: Heads, exact: Tensor) -> Case:
    """One KV head with its queries, by one method, against `exact[t, h, D]`."""
    from seqpar.ragged import RaggedBatch

    tokens, unit = where[0], float(gather(heads.v).double().norm(dim=-1).max())
    shape = heads.q.shape[1], heads.k.shape[1], heads.q.shape[2]
    answer = attend(core_of(method, *shape), heads, RaggedBatch.prefill((tokens,)))
    dense = dense_bytes(tokens, *shape[1:])
    if method.policy is None and answer.sent != dense:
        raise WrongResultError(f"the ring sent {answer.sent} bytes, the dense exchange is {dense}")
    difference = gather(answer.out.double() - exact)
    error = difference.norm(dim=-1) / unit
    bound = None if answer.bound is None else gather(answer.bound).double() / unit
    return Case(
        *where,
        method.name,
        answer.sent / dense,
        float(error.max()),
        float(error.flatten().kthvalue(math.ceil(0.99 * error.numel())).values),
        float(error.mean()),
        float(difference.norm() / gather(exact).norm()),
        None if bound is None else float(bound.max()),
        0 if bound is None else int((error > bound).sum()),
        answer.rounds,
    )


def sharpness_of(where: tuple[int, int, int, int], heads: Heads, exact: Truth) -> Sharpness:
    """Over the queries of all ranks but the first, which has no remote keys."""
    distant = slice(len(heads.q), None)
    effective, remote = (gather(x)[distant].flatten() for x in exact[1:])
    largest = (heads.q.double().norm(dim=-1).max() * heads.k.double().norm(dim=-1).max()) / heads.q.shape[-1] ** 0.5
    return Sharpness(
        *where,
        float(effective.median()),
        float(remote.median()),
        float(remote.quantile(0.9)),
        float(gather(largest[None]).max()),
    )


def of_group(x: Any, head: int, kv_heads: int) -> Any:
    """The query heads of one KV head, of everything in a tuple of [t, heads, ...]."""
    return type(x)(*(part.tensor_split(kv_heads, 1)[head].contiguous() for part in x))


def look_at_heads(read: Read, length: int, text: int, chosen: Sequence[Method]) -> tuple[list[Case], list[Sharpness]]:
    """Every layer and KV head of one reading, by every method."""
    cases, sharpness = [], []
    for layer, heads in enumerate(read.heads):
        exact = truth(heads, read.rows)
        for head in range(heads.k.shape[1]):
            mine, its = of_group(heads, head, heads.k.shape[1]), of_group(exact, head, heads.k.shape[1])
            where = (length, text, layer, head)
            sharpness.append(sharpness_of(where, mine, its))
            cases += [case_of(where, method, mine, its.out) for method in chosen]
            check_cases(cases[-len(chosen) :])
    return cases, sharpness


def check_cases(cases: Sequence[Case]) -> None:
    """The ring, and a policy that promises no error, are exact up to bfloat16."""
    for case in cases:
        if case.method in ("dense", "Certified(0)") and case.relative > 2**-8:
            raise WrongResultError(f"{case.method} at layer {case.layer}: relative error {case.relative:.2e}")


# The model.


def judge(read: Read, dense: Read, text: Text) -> Tensor:
    """Sums of one rank: KL, loss and count of source, likeliest tokens that stay, then hits and asked by distance."""
    rows = read.rows[read.rows + 1 < len(text.ids)]
    targets, logs = text.ids[rows + 1], read.logits[: len(rows)].double().log_softmax(-1)
    base = dense.logits[: len(rows)].double().log_softmax(-1)
    source, distance = text.source[rows + 1], text.distance[rows + 1]
    likeliest = logs.argmax(-1)
    right = likeliest == targets
    by_distance = [right[distance == d].sum() for d in text.distances]
    asked = [(distance == d).sum() for d in text.distances]
    numbers = [
        F.kl_div(logs, base, reduction="sum", log_target=True),
        F.nll_loss(logs[source], targets[source], reduction="sum"),
        source.sum(),
        (likeliest == base.argmax(-1)).sum(),
        *by_distance,
        *asked,
    ]
    return torch.stack([number.double() for number in numbers])


def read_by(method: Method, text: Text, reader: Reader, dense: Read | None, *, decodes: bool) -> tuple[Read, Tensor]:
    """One text by one method: the reading, and bytes sent, `judge`'s sums, hits and asked of decode."""
    from seqpar import comm

    config = reader.model.config
    core = core_of(method, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    with comm.record() as sent:
        read = reader.read(text.ids, core)
    answers = reader.answers(read.heads, text.asks) if decodes else text.asks[:0, 0]
    decode = torch.stack([(answers == text.answers[: len(answers)]).sum(), torch.tensor(len(answers))])
    numbers = [torch.tensor([sent.total.sent_bytes]), judge(read, dense or read, text), decode]
    return read, over_ranks(torch.cat([part.double() for part in numbers]))


def reading_of(sums: Tensor, exact: Tensor, method: Method, texts: Sequence[Text], reader: Reader) -> Reading:
    """The sums over all texts, of all ranks, by a method and by the dense exchange, as numbers for people."""
    config, length = reader.model.config, len(texts[0].ids)
    dense = config.num_hidden_layers * dense_bytes(length, config.num_key_value_heads, config.head_dim) * len(texts)
    sent, kl, loss, source, same, *rest = sums.tolist()
    distances, tokens = texts[0].distances, len(texts) * (length - 1)
    hits, asked = rest[: len(distances)], rest[len(distances) : -2]
    retrieval = {d: (int(a), int(b)) for d, a, b in zip(distances, hits, asked, strict=True)}
    decode = int(rest[-2]), int(rest[-1])
    return Reading(
        length,
        method.name,
        length * len(texts),
        float(exact[2] / exact[3]),
        sent / dense,
        kl / tokens,
        loss / source,
        same / tokens,
        retrieval,
        decode,
    )


# Shapes.


def random_layer(tokens: int) -> tuple[Heads, Tensor]:
    """A tensor-parallel quarter of a Llama-8B layer with random weights on normed Gaussian input: 8 query, 2 KV heads.

    This rank's tokens, and which they are.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    size = tokens // RANKS
    rows = torch.arange(size) + size * dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4096, 12 * 128, generator=generator) * 0.02
    x = torch.randn(tokens, 4096, generator=generator)[rows] @ weights
    q, k, v = x.view(size, 12, 128).split([8, 2, 2], 1)
    angles = rows[:, None] / THETA[128] ** (torch.arange(0, 128, 2) / 128)
    cos, sin = torch.cat([angles, angles], 1).cos()[None], torch.cat([angles, angles], 1).sin()[None]
    turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    q, k = (part[0].transpose(0, 1) for part in turned)
    return Heads(*(part.bfloat16().contiguous() for part in (q, k, v))), rows


def look_at_shapes(tokens: int, chosen: Sequence[Method], step: Callable[[str], None]) -> list[Case]:
    heads, rows = random_layer(tokens)
    exact, cases = truth(heads, rows), []
    for method in chosen:
        step(f"8B shapes: {method.name}")
        cases.append(case_of((tokens, 0, 0, 0), method, heads, exact.out))
    check_cases(cases)
    return cases


# Measuring.


@torch.inference_mode()
def measure(
    chosen: Sequence[Method],
    texts: dict[int, list[Text]],
    head_texts: int,
    shape_tokens: int,
    part: Path | None = None,
    heads_only: bool = False,
) -> Found:
    """Everything, on every rank; `part` holds what there is after each length."""
    reader, done = Reader(), 0
    reads = chosen[:1] if heads_only else chosen
    total = len(reads) * sum(map(len, texts.values())) + sum(min(len(t), head_texts) for t in texts.values())
    total += len(chosen) if shape_tokens else 0
    found = Found([], [], [], [])

    def step(what: str) -> None:
        nonlocal done
        progress(done, total, what)
        done += 1

    for length, those in texts.items():
        sums: dict[Method, list[Tensor]] = {method: [] for method in reads}
        for at, text in enumerate(those):
            dense: Read | None = None
            for method in reads:
                step(f"{length} tokens, text {at + 1} of {len(those)}: {method.name}")
                read, numbers = read_by(method, text, reader, dense, decodes=at < head_texts)
                dense = dense or read
                sums[method].append(numbers)
            assert dense is not None
            if at == 0:
                check_dense(dense, text, reader)
            if at < head_texts:
                step(f"{length} tokens, text {at + 1}: heads")
                cases, sharpness = look_at_heads(dense, length, at, chosen)
                found.cases.extend(cases)
                found.sharpness.extend(sharpness)
        found.readings.extend(
            reading_of(torch.stack(numbers).sum(0), torch.stack(sums[chosen[0]]).sum(0), method, those, reader)
            for method, numbers in sums.items()
        )
        if part and not dist.get_rank():
            store(part, storable(found))
    if shape_tokens:
        found.shapes.extend(look_at_shapes(shape_tokens, chosen, step))
    progress(total, total, "done")
    return found


def check_dense(read: Read, text: Text, reader: Reader) -> None:
    """The dense reading says what the unswapped model says, up to q, k and v in bfloat16: next tokens, 99 of 100."""
    logits = reader.whole(input_ids=text.ids[None], use_cache=False).logits[0, read.rows]
    same = float((logits.argmax(-1) == read.logits.argmax(-1)).double().mean())
    if same < 0.98:
        raise WrongResultError(f"the dense reading has {same:.3f} of the unswapped model's likeliest tokens")


# The report.


class Summary(NamedTuple):
    """One length and method: quantiles over texts, layers and heads, and the reading."""

    length: int
    method: str
    bytes_median: float
    bytes_p90: float
    worst: float
    mean: float
    certificate: float | None
    broken: int
    relative: float
    rounds: int
    reading: Reading | None


def summary_of(cases: Sequence[Case], reading: Reading | None = None) -> Summary:
    """Cases of one length and method."""
    certificates = [case.certificate for case in cases if case.certificate is not None]
    return Summary(
        cases[0].length,
        cases[0].method,
        quantile([case.bytes_ratio for case in cases], 0.5),
        quantile([case.bytes_ratio for case in cases], 0.9),
        quantile([case.worst for case in cases], 1.0),
        sum(case.mean for case in cases) / len(cases),
        max(certificates, default=None),
        sum(case.broken for case in cases),
        quantile([case.relative for case in cases], 0.5),
        max(case.rounds for case in cases),
        reading,
    )


def quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def summaries_of(found: Found, chosen: Sequence[Method]) -> list[Summary]:
    """By length, then as methods are chosen."""
    order = {method.name: at for at, method in enumerate(chosen)}

    def place(entry: Case | Reading) -> tuple[int, int]:
        return entry.length, order[entry.method]

    readings = {place(reading): reading for reading in found.readings}
    grouped = groupby(sorted(found.cases, key=place), place)
    return [summary_of(list(cases), readings.get(at)) for at, cases in grouped]


def accuracy(reading: Reading) -> float:
    """The mean over distances, in points."""
    return 100 * sum(hits / asked for hits, asked in reading.retrieval.values()) / len(reading.retrieval)


def more_perplexity(reading: Reading) -> float:
    """Beside the dense one's, in %."""
    return 100 * math.expm1(reading.loss - reading.dense_loss)


def rows_of(summaries: Sequence[Summary], chosen: Sequence[Method]) -> list[Row]:
    """What was promised."""
    rows, by_name = [], {method.name: method for method in chosen}
    for entry in summaries:
        epsilon, name = by_name[entry.method].epsilon, f"{entry.length} tokens, {entry.method}"
        if epsilon is None:
            continue
        target = CERTIFIED_TARGETS.get(epsilon) if entry.length >= LONG else None
        ok = None if target is None else entry.bytes_median <= target
        rows.append(Row(f"{name}: bytes ÷ dense, median of layers and heads", entry.bytes_median, "x", target, ok))
        rows.append(Row(f"{name}: the same, 90th percentile", entry.bytes_p90, "x"))
        rows.append(
            Row(f"{name}: queries with an error above their certificate", entry.broken, "", 0, not entry.broken)
        )
        assert entry.certificate is not None
        met = entry.certificate <= epsilon
        if epsilon:
            rows.append(Row(f"{name}: largest certificate ÷ max |v|", entry.certificate, "", epsilon, met))
    return [*rows, *topmass_rows(summaries, by_name)]


def topmass_rows(summaries: Sequence[Summary], by_name: dict[str, Method]) -> list[Row]:
    """The reading by TopMass that finds the most within the bytes allowed, beside the dense one."""
    rows = []
    for length in sorted({entry.length for entry in summaries if entry.length >= LONG}):
        readings = {entry.method: entry.reading for entry in summaries if entry.length == length}
        dense = readings["dense"]
        masses = [r for name, r in readings.items() if by_name[name].family == "TopMass" and r is not None]
        allowed = [reading for reading in masses if reading.bytes_ratio <= TOPMASS_BYTES]
        if not masses or dense is None:
            continue
        best = max(allowed or masses, key=accuracy)
        lost = accuracy(dense) - accuracy(best)
        name = f"{length} tokens, {best.method} at {100 * best.bytes_ratio:.0f} % of the bytes: retrieval lost"
        met = bool(allowed) and lost <= TOPMASS_POINTS
        rows.append(Row(name, lost, "points", TOPMASS_POINTS, met))
    return rows


def tables_of(found: Found, summaries: Sequence[Summary], rows: Sequence[Row]) -> str:
    """Markdown: what was promised, every method at every length, retrieval by distance, heads, shapes."""
    verdict = {None: "", True: "met", False: "**missed**"}
    parts = ["### Targets", "", "| | value | target | |", "|---|---:|---:|---|"]
    parts += [
        f"| {row.name.replace('|', '&#124;')} | {row.value:.3g} {row.unit} | "
        f"{'' if row.target is None else f'{row.target:g}'} | {verdict[row.ok]} |"
        for row in rows
    ]
    for length, entries in groupby(summaries, lambda entry: entry.length):
        parts += ["", f"### {length} tokens", "", *_methods_table(list(entries))]
    parts += ["", "### Retrieval by distance, %", ""]
    for _, readings in groupby(found.readings, lambda reading: reading.length):
        parts += [*_retrieval_table(list(readings)), ""]
    parts += ["### Layers and KV heads", "", *_heads_table(found), ""]
    if found.shapes:
        parts += ["### A quarter of a Llama-8B layer, random weights", "", *_shapes_table(found.shapes)]
    return "\n".join(parts)


def _methods_table(entries: Sequence[Summary]) -> list[str]:
    dense = entries[0].reading
    lines = [
        "| | bytes ÷ dense: model | heads, median | p90 | error ÷ max &#124;v&#124;: worst | mean | "
        "largest certificate | relative error | tokens read | KL, mnats | perplexity | same token | retrieval | "
        "by decode |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        certificate = "" if entry.certificate is None else f"{entry.certificate:.2g}"
        cells = [f"{entry.bytes_median:.3f}", f"{entry.bytes_p90:.3f}", f"{entry.worst:.2g}", f"{entry.mean:.2g}"]
        cells += [certificate, f"{entry.relative:.2g}"]
        whole, *rest = _reading_cells(entry.reading, dense)
        lines.append(f"| {' | '.join([entry.method, whole, *cells, *rest])} |")
    return lines


def _reading_cells(reading: Reading | None, dense: Reading | None) -> list[str]:
    """Bytes, tokens, KL and so on; nothing where heads alone were looked at."""
    if reading is None:
        return [""] * 7
    perplexity = f"{math.exp(reading.loss):.2f}" if reading is dense else f"{more_perplexity(reading):+.2f} %"
    return [
        f"{reading.bytes_ratio:.3f}",
        f"{reading.tokens}",
        f"{1000 * reading.kl:.3g}",
        perplexity,
        f"{100 * reading.same:.1f} %",
        f"{accuracy(reading):.1f} %",
        share(reading.decode),
    ]


def share(hits: tuple[int, int]) -> str:
    return f"{100 * hits[0] / hits[1]:.1f} %" if hits[1] else ""


def _retrieval_table(readings: Sequence[Reading]) -> list[str]:
    distances = list(readings[0].retrieval)
    asked = readings[0].retrieval[distances[0]][1]
    lines = [
        f"| {readings[0].length} tokens, {asked} each | {' | '.join(map(str, distances))} |",
        "|---|" + "---:|" * len(distances),
    ]
    for reading in readings:
        values = [f"{100 * hits / count:.1f}" for hits, count in reading.retrieval.values()]
        lines.append(f"| {reading.method} | {' | '.join(values)} |")
    return lines


def _heads_table(found: Found) -> list[str]:
    """How sharp, and bytes by the certified methods, of the longest texts that they read; means over texts."""
    certified = [case for case in found.cases if case.certificate is not None]
    length = max(entry.length for entry in certified or found.sharpness)
    names = list(dict.fromkeys(case.method for case in certified if case.length == length))
    lines = [
        f"| {length} tokens, layer.head | effective keys | remote mass, median | p90 | largest score at most | "
        f"{' | '.join(names)} |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(names),
    ]
    sharp = [entry for entry in found.sharpness if entry.length == length]
    for layer, head in sorted({(entry.layer, entry.head) for entry in sharp}):
        these = [entry for entry in sharp if (entry.layer, entry.head) == (layer, head)]
        cases = [case for case in found.cases if (case.length, case.layer, case.head) == (length, layer, head)]
        values = [_mean([case.bytes_ratio for case in cases if case.method == name]) for name in names]
        lines.append(
            f"| {layer}.{head} | {_mean([e.effective for e in these]):.1f} | {_mean([e.remote for e in these]):.3f} | "
            f"{_mean([e.remote_p90 for e in these]):.3f} | {_mean([e.largest for e in these]):.0f} | "
            f"{' | '.join(f'{value:.3f}' for value in values)} |"
        )
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shapes_table(cases: Sequence[Case]) -> list[str]:
    lines = [
        f"| {cases[0].length} tokens, 8 query and 2 KV heads of 128 | bytes ÷ dense | "
        "error ÷ max &#124;v&#124;, worst | mean | largest certificate | relative error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        certificate = "" if case.certificate is None else f"{case.certificate:.2g}"
        lines.append(
            f"| {case.method} | {case.bytes_ratio:.3f} | {case.worst:.2g} | {case.mean:.2g} | {certificate} | "
            f"{case.relative:.2g} |"
        )
    return lines


def picture(path: Path, summaries: Sequence[Summary], chosen: Sequence[Method], title: str) -> None:
    """Error, KL, perplexity and retrieval over bytes, a row for each of the two longest texts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    family = {method.name: method.family for method in chosen}
    lengths = sorted({entry.length for entry in summaries})[-2:]
    figure, grid = plt.subplots(len(lengths), 4, figsize=(15, 3.6 * len(lengths)), layout="constrained", squeeze=False)
    for panels, length in zip(grid, lengths, strict=True):
        entries = [entry for entry in summaries if entry.length == length]
        for name in dict.fromkeys(family[entry.method] for entry in entries):
            these = [entry for entry in entries if family[entry.method] == name]
            for panel, (values, label, scale) in zip(panels, _panels(these), strict=True):
                heads = label.startswith("error")
                across = [
                    entry.bytes_median if heads else entry.reading.bytes_ratio
                    for entry in these
                    if heads or entry.reading is not None
                ]
                panel.plot(across, values, "*" if name == "dense" else "o-", markersize=5, label=name)
                panel.set(yscale=scale, xlabel="bytes ÷ dense exchange", xlim=(0, None))
                panel.set_title(f"{length} tokens: {label}", fontsize=9, loc="left")
        panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(entries: Sequence[Summary]) -> list[tuple[list[float], str, str]]:
    readings = [entry.reading for entry in entries if entry.reading is not None]
    return [
        ([entry.worst for entry in entries], "error ÷ max |v|, worst query of any head", "log"),
        ([max(1000 * reading.kl, 1e-2) for reading in readings], "KL to dense, mnats per token", "log"),
        ([more_perplexity(reading) for reading in readings], "perplexity, change in %", "linear"),
        ([accuracy(reading) for reading in readings], "retrieval, % (mean over distances)", "linear"),
    ]


def rounded(entry: Any) -> Any:
    """Five digits are enough to store; what is no number is none in JSON."""
    if isinstance(entry, float):
        return float(f"{entry:.5g}") if math.isfinite(entry) else None
    return entry


def storable(found: Found) -> dict[str, list[dict[str, Any]]]:
    """What `stored` reads."""
    return {
        name: [{key: rounded(value) for key, value in entry._asdict().items()} for entry in part]
        for name, part in found._asdict().items()
    }


def store(path: Path, about: dict[str, Any]) -> None:
    path.write_text(json.dumps({"meta": about}))


def stored(path: Path) -> Found:
    """What a run wrote with `--json`."""
    about = json.loads(path.read_text())["meta"]
    kinds = {"cases": Case, "sharpness": Sharpness, "readings": Reading, "shapes": Case}
    return Found(*([_restored(kind, entry) for entry in about[name]] for name, kind in kinds.items()))


def _restored(kind: type[Any], entry: dict[str, Any]) -> Any:
    values = {key: math.nan if value is None and key != "certificate" else value for key, value in entry.items()}
    if kind is Reading:
        values["retrieval"] = {int(d): tuple(pair) for d, pair in values["retrieval"].items()}
        values["decode"] = tuple(values["decode"])
    return kind(**values)


def joined(runs: Sequence[Found], chosen: Sequence[Method]) -> Found:
    """One after another, the last one's where two have the same; by length, text, layer, head and chosen method."""
    order = {method.name: at for at, method in enumerate(chosen)}

    def place(entry: Any) -> tuple[int, ...]:
        where = tuple(getattr(entry, name, 0) for name in ("length", "text", "layer", "head"))
        return *where, order[getattr(entry, "method", chosen[0].name)]

    parts = []
    for part in zip(*runs, strict=True):
        known = [entry for run in part for entry in run if getattr(entry, "method", chosen[0].name) in order]
        entries = {place(entry): entry for entry in known}
        parts.append([entries[at] for at in sorted(entries)])
    return Found(*parts)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--lengths", type=int, nargs="*", default=LENGTHS, help="tokens of a text; none to report alone"
    )
    arguments.add_argument("--tokens", type=int, help="read at each length")
    arguments.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="policies, or families, beside the dense exchange"
    )
    arguments.add_argument("--add", type=Path, nargs="+", default=(), metavar="JSON", help="what other runs wrote")
    arguments.add_argument("--heads", action="store_true", help="layers and KV heads alone, by dense activations")
    arguments.add_argument("--shapes", type=int, help="tokens for the 8B layer; 0 for none")
    arguments.epilog = "a run that is stopped leaves FILE.part.json, for --add"
    args = arguments.parse_args()
    everything = methods(args.quick)
    chosen = [m for m in everything if m.policy is None or not args.only or {m.family, m.name} & set(args.only)]
    lengths, tokens = ((512,), 512) if args.quick else (tuple(args.lengths), args.tokens)
    texts = {n: draw(n, max(1, (tokens or (TOKENS if n >= LONG else FEWER)) // n)) for n in lengths}
    shape_tokens = (256 if args.quick else SHAPE_TOKENS) if args.shapes is None else args.shapes
    runs = [stored(path) for path in args.add]
    if lengths:
        part = args.json and args.json.with_suffix(".part.json")
        runs.append(launch(RANKS, measure, chosen, texts, HEAD_TEXTS, shape_tokens, part, args.heads))
    found, chosen = joined(runs, everything), everything
    summaries = summaries_of(found, chosen)
    rows = rows_of(summaries, chosen)
    tables = tables_of(found, summaries, rows)
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        ranks=RANKS,
        model="examples/tiny-llama; q, k, v in bfloat16, all else in float32",
        tokens_read=tokens or {"long": TOKENS, "short": FEWER},
        head_texts=HEAD_TEXTS,
        **storable(found),
    )
    plot, args.plot = args.plot, None
    report(args, about, rows, "sparse attention on the bundled model, 4 gloo ranks: bytes and errors", tables)
    print(tables)
    if plot:
        picture(plot, summaries, chosen, f"examples/tiny-llama on 4 ranks; {args.machine}, {about['date']}")


if __name__ == "__main__":
    main()
