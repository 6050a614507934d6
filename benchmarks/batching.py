"""What runs together in a step: piggybacked decodes, policies on one trace, one loop beside concurrent instances.

Two models in float32, of which every rank has its slices, one compute thread a rank: the bundled one, and a Llama of
random weights of more than 1 GB, which no cache holds. Four parts:

*piggyback*, SARATHI's Table 2: a step of C prompt tokens, a step of B decodes over 1024 cached tokens each, and a mixed
one of B - 1 decodes and a chunk that fills it up to C tokens. A decode's marginal cost is what the mixed step takes
beyond its prompt tokens at the rate of the first, for each of its decodes; alone it costs the second step's time by B.

*policies*: one seeded trace of 16 requests, some of long prompts that come while others decode, served under every
policy, one at a time, and by Transformers' own continuous batching (one rank). Worst TBT is the longest time between
two tokens of any request. Arrivals are given in the time that a lone long prompt takes on the ranks at hand, so that
these are as busy with prompts whatever their number. In lone decode steps, which on several ranks mostly wait for sums,
two ranks would be given a trace that is three times as light.

*flover*: 32 requests of 8 tokens each, which come at random; fused into one loop over two ranks, and by two instances
of the model, one on each core, of which each serves a request at a time. More instances than cores would take turns.

*host*: composing a step of 256 requests and building its batch, in processor time.

Results are compared first. Every contender must generate the greedy tokens of each request alone, up to a token where
the best two logits are closer than products of other shapes round; a wrong one ends the run with exit status 1 and no
numbers. Contenders take turns in every round; ratios are paired, medians with 95 % intervals.

`make peers` installs psutil, without which Transformers' continuous batching refuses to run on a CPU; a peer that does
not run is listed with its error.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from common import Contender, Row, Timing, WrongResultError, check, launch, meta, parser, progress, ratio, report
from common import time_rounds as rounds_of
from torch import Tensor

import seqpar
from seqpar import comm
from seqpar.batching import (
    Budget,
    DecodeMaximal,
    Exclusive,
    FullHybrid,
    Policy,
    PrefillFirst,
    Progress,
    Request,
    RequestLevel,
    Room,
    StallFree,
    TemporalFusion,
    compose,
)
from seqpar.kv import PagedKV

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-llama"
PARTS = ("piggyback", "policies", "flover", "host")
ALONE, PEER = "one at a time", "Transformers"
LIVE, TILE, MOST_TOKENS, CONTEXT = 16, 16, 2048, 1024
PAGE = CONTEXT + 64  # one for each request: its keys are read in place, as in a contiguous cache
PEER_LIMIT_S = 60.0
CLOSE = 1e-4  # of the largest logit: a hundred times what float32 products of other shapes differ by
TOLERANCE = 1e-4  # of logits, likewise
PIGGYBACK, THROUGHPUT, WORST_TBT, HOST_MS = 0.35, 3.0, 0.3, 0.3  # targets; throughput from below
PUBLISHED = {0.0034: 11.2, 0.086: 6.5, 0.86: 1.1}  # Flover: Poisson gaps of 20, 500, 5000 ms, requests of 5.8 s
PACKAGES = ("seqpar", "torch", "transformers")


class Model(NamedTuple):
    """A model, and what suits its size.

    Attributes:
        name: for the report.
        steps: cases of *piggyback*: tokens of a step, decodes alone.
        tau: tokens of a step under the policies that bound it.
        prompts: lengths of short prompts.
        long: length of long ones.
        gap: between their arrivals, on average, in the time that one of them takes alone.
        new: tokens to generate.
        fused_new: those of *flover*.
        gaps: between arrivals there, in the time of a lone request.
        rounds: of *piggyback*, *policies*, *flover*.
    """

    name: str
    steps: tuple[tuple[int, int], ...]
    tau: int
    prompts: tuple[int, int]
    long: int
    gap: float
    new: tuple[int, int]
    fused_new: int
    gaps: tuple[float, ...]
    rounds: tuple[int, int, int]


BUNDLED = Model(
    "bundled", ((64, 4), (256, 4), (256, 16)), 64, (8, 48), 768, 0.45, (48, 96), 64, (0.0034, 0.086, 0.86), (40, 5, 3)
)
LARGE = Model("1 GB", ((64, 4), (256, 4), (64, 16)), 32, (8, 48), 192, 0.45, (10, 20), 8, (0.0034,), (11, 2, 2))
MODELS = {model.name: model for model in (BUNDLED, LARGE)}


def quick(model: Model) -> Model:
    steps, rounds = model.steps[:1], (5, 1, 1)
    return model._replace(steps=steps, new=(4, 8), fused_new=8, gaps=model.gaps[:1], rounds=rounds)


def random_weights(folder: Path) -> None:
    """Write a Llama of 259 million random parameters, 1.04 GB in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# Requests, and how they were served.


class Arrival(NamedTuple):
    """When a request comes, in some unit of time, and what it asks for."""

    at: float
    prompt: tuple[int, ...]
    new: int


class Served(NamedTuple):
    """Every request's tokens, when they and when it came, in seconds after the start; steps, and requests that ran."""

    tokens: list[list[int]]
    times: list[list[float]]
    arrived: list[float]
    steps: int = 0
    live: float = 0.0

    @property
    def seconds(self) -> float:
        return max(max(times) for times in self.times)

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for times in self.times for before, after in pairwise(times)]

    @property
    def first_s(self) -> list[float]:
        return [times[0] - at for times, at in zip(self.times, self.arrived, strict=True)]


def trace(model: Model, vocab_size: int, requests: int, seed: int = 0) -> list[Arrival]:
    """Short prompts that are there at once, and long ones, a quarter of all, while the short ones decode."""
    draw = random.Random(seed)

    def arrival(at: float, length: int) -> Arrival:
        return Arrival(at, tuple(draw.randrange(3, vocab_size) for _ in range(length)), draw.randint(*model.new))

    arrivals = [arrival(0.0, draw.randint(*model.prompts)) for _ in range(requests - requests // 4)]
    now = 0.0
    for _ in range(requests // 4):
        now += model.gap * (0.5 + draw.random())
        arrivals.append(arrival(now, model.long))
    return arrivals


def poisson(count: int, gap: float, new: int, vocab_size: int) -> list[Arrival]:
    """Flover's requests: prompts of 8 tokens, one length of answers."""
    draw, now, arrivals = random.Random(1), 0.0, []
    for _ in range(count):
        arrivals.append(Arrival(now, tuple(draw.randrange(3, vocab_size) for _ in range(8)), new))
        now += draw.expovariate(1 / gap)
    return arrivals


def serve(loop: TemporalFusion, arrivals: Sequence[Arrival], unit_s: float) -> Served:
    """Let requests join when they come, and step until none is left."""
    queue = deque(sorted(enumerate(arrivals), key=lambda each: each[1].at))
    found = Served([[] for _ in arrivals], [[] for _ in arrivals], [each.at * unit_s for each in arrivals])
    steps = live = 0
    start = time.perf_counter()
    while queue or loop.live:
        now = time.perf_counter() - start
        while queue and queue[0][1].at * unit_s <= now:
            number, arrival = queue.popleft()
            loop.add(Request(number, arrival.prompt, arrival.new))
        if not loop.live:
            time.sleep(max(0.0, queue[0][1].at * unit_s - now))
            continue
        emitted = loop.step()
        now = time.perf_counter() - start
        steps, live = steps + 1, live + len(loop.running)
        for number, token, _ in emitted:
            assert isinstance(number, int) and token is not None
            found.tokens[number].append(token)
            found.times[number].append(now)
    return found._replace(steps=steps, live=live / max(1, steps))


class Margins:
    """A step function that notes how far the best logit of each row lies above the next, by the largest."""

    def __init__(self, model: seqpar.hf.Stepper) -> None:
        self._model = model
        self.found: list[float] = []

    def __call__(self, batch: Any, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        logits: Tensor = self._model(batch, tokens, rows)
        best = logits.topk(2).values
        self.found += ((best[:, 0] - best[:, 1]) / logits.abs().amax(1)).tolist()
        return logits


def compare(name: str, got: Served, expected: Served, margins: Sequence[Sequence[float]]) -> int:
    """Refuse tokens that are not those of each request alone; returns how many were not looked at.

    Those are the ones after a token of which the best two logits are too close to be told apart, where the other one
    was taken: what follows then answers another text.

    Raises:
        WrongResultError: other tokens, or another number of them.
    """
    left = 0
    for number, (mine, theirs) in enumerate(zip(got.tokens, expected.tokens, strict=True)):
        if len(mine) != len(theirs):
            raise WrongResultError(f"{name}: request {number} has {len(mine)} tokens instead of {len(theirs)}")
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        if at is not None and margins[number][at] > CLOSE:
            raise WrongResultError(f"{name}: request {number} generates {mine[at]} instead of {theirs[at]} at {at}")
        left += 0 if at is None else len(mine) - at
    return left


def through(
    model: Any,
    kv: PagedKV,
    vocab_size: int,
    arrivals: Sequence[Arrival],
    unit_s: float,
    policy: Policy,
    live: int,
    group: comm.ProcessGroup,
) -> Served | None:
    """Serve a trace in one loop over the ranks of a group; None but on the first of them."""
    lead = group if group.size() > 1 else None
    budget = Budget(MOST_TOKENS, live)
    loop = TemporalFusion(model, kv, vocab_size=vocab_size, policy=policy, budget=budget, lead=lead)
    dist.barrier()
    if group.rank():
        loop.follow()
        return None
    with loop:
        return serve(loop, arrivals, unit_s)


# The parts.


class Piggyback(NamedTuple):
    """Seconds of every round: a step of prompt tokens alone, of decodes alone, and of both."""

    tokens: int
    alone: int
    prompt: Timing
    decode: Timing
    mixed: Timing

    @property
    def name(self) -> str:
        return f"{self.tokens - self.alone + 1} prompt tokens and {self.alone - 1} decodes"

    def marginal_s(self) -> tuple[Timing, Timing]:
        """Of a piggybacked decode, and of one of the decodes alone."""
        decodes = self.alone - 1
        share = (self.tokens - decodes) / self.tokens
        beyond = [(both - share * p) / decodes for both, p in zip(self.mixed.rounds, self.prompt.rounds, strict=True)]
        return Timing("piggybacked", tuple(beyond)), Timing("alone", tuple(d / self.alone for d in self.decode.rounds))


class Mixes:
    """Steps of decodes over random keys and of a prompt's tokens; each is undone before the next."""

    def __init__(self, stepper: seqpar.hf.Stepper, most: int) -> None:
        self.stepper, self.kv, self.most = stepper, stepper.kv, most
        batch = self.kv.batch(range(most), [CONTEXT] * most)
        shape = (2, most * CONTEXT, self.kv.num_kv_heads, self.kv.head_dim)
        for layer in range(self.kv.num_layers):
            k, v = torch.randn(shape)
            self.kv.append(layer, k, v, batch)

    def step(self, decodes: int, prompt: int) -> Tensor:
        """The logits of every decode, and of the prompt's last token."""
        ids: list[Any] = list(range(decodes))
        if prompt:
            ids.append("prompt")
        q_lens = [1] * decodes + [prompt] * bool(prompt)
        rows = [*range(decodes), *([decodes + prompt - 1] if prompt else [])]
        tokens = torch.arange(3, 3 + sum(q_lens)) % self.stepper.vocab_size
        tokens[decodes:] = tokens[decodes:].flip(0)
        return self.stepper(self.kv.batch(ids, q_lens), tokens, rows)

    def undo(self) -> None:
        for request in self.kv.ids:
            if request == "prompt":
                self.kv.free(request)
            elif self.kv.length(request) > CONTEXT:
                self.kv.truncate(request, CONTEXT)

    def contender(self, name: str, decodes: int, prompt: int) -> Contender:
        return Contender(name, lambda: self.step(decodes, prompt), self.undo)

    def verify(self, decodes: int, prompt: int) -> None:
        """The mixed step gives what its halves give."""
        self.undo()
        mixed = self.step(decodes, prompt)
        self.undo()
        alone = self.step(decodes, 0)
        self.undo()
        tokens = torch.arange(3, 3 + decodes + prompt) % self.stepper.vocab_size
        batch = self.kv.batch(["prompt"], [prompt])
        whole = self.stepper(batch, tokens[decodes:].flip(0), [prompt - 1])
        self.undo()
        check(f"{decodes} decodes beside {prompt} tokens", mixed[:decodes], alone, TOLERANCE)
        check(f"{prompt} tokens beside {decodes} decodes", mixed[decodes:], whole, TOLERANCE)

    def close(self) -> None:
        for request in self.kv.ids:
            self.kv.free(request)


def piggyback(stepper: seqpar.hf.Stepper, model: Model) -> list[Piggyback]:
    mixes = Mixes(stepper, max(alone for _, alone in model.steps))
    found = []
    for at, (tokens, alone) in enumerate(model.steps):
        progress(at, len(model.steps), f"{model.name}: {tokens} tokens, {alone - 1} of them decodes")
        mixes.verify(alone - 1, tokens - alone + 1)
        contenders = [
            mixes.contender("prompt", 0, tokens),
            mixes.contender("decode", alone, 0),
            mixes.contender("mixed", alone - 1, tokens - alone + 1),
        ]
        timings = rounds_of(contenders, model.rounds[0])
        found.append(Piggyback(tokens, alone, *timings))
    progress(len(model.steps), len(model.steps), f"{model.name}: piggybacked decodes")
    mixes.undo()
    mixes.close()
    return found


class Policies(NamedTuple):
    """Every round of every contender, why the peer did not run, and tokens that could not be compared."""

    served: dict[str, list[Served]]
    unit_s: float
    error: str | None
    uncompared: int


def contenders(model: Model) -> dict[str, tuple[Policy, int]]:
    """Policies, and how many requests may run at a time."""
    return {
        ALONE: (FullHybrid(), 1),
        "RequestLevel": (RequestLevel(), LIVE),
        "PrefillFirst": (PrefillFirst(), LIVE),
        "FullHybrid": (FullHybrid(), LIVE),
        "DecodeMaximal": (DecodeMaximal(model.tau, TILE), LIVE),
        "StallFree": (StallFree(model.tau, TILE), LIVE),
        "Exclusive": (Exclusive(0.25), LIVE),
    }


def policies(
    stepper: seqpar.hf.Stepper, model: Model, group: comm.ProcessGroup, path: Path, requests: int
) -> Policies | None:
    arrivals = trace(model, stepper.vocab_size, requests)
    unit_s = lone_prompt_s(stepper, model.long)
    served: dict[str, list[Served]] = {}
    margins = Margins(stepper)
    peer, error = open_peer(path, arrivals) if group.size() == 1 else (None, None)
    names = [*contenders(model), *([PEER] if peer else [])]
    for turn in range(model.rounds[1]):
        for at in range(len(names)):
            name = names[(at + turn) % len(names)]
            progress(turn * len(names) + at, model.rounds[1] * len(names), f"{model.name}: {name}")
            if name == PEER:
                try:
                    if peer is not None:
                        served.setdefault(name, []).append(peer.serve(arrivals, unit_s))
                except Exception as failed:  # whatever it is, it is theirs
                    peer, error = None, f"{type(failed).__name__}: {failed}"
                continue
            policy, live = contenders(model)[name]
            function = margins if name == ALONE and not turn else stepper
            found = through(function, stepper.kv, stepper.vocab_size, arrivals, unit_s, policy, live, group)
            if found is not None:
                served.setdefault(name, []).append(found)
    progress(1, 1, f"{model.name}: policies")
    if peer is not None:
        peer.close()
    if group.rank():
        return None
    alone = served[ALONE][0]
    left = iter(margins.found)
    close = [[next(left) for _ in tokens] for tokens in alone.tokens]
    uncompared = 0
    for name, runs in served.items():
        for run in runs:
            uncompared += compare(f"{model.name}, {name}", run, alone, close)
    return Policies(served, unit_s, error, uncompared)


def lone_prompt_s(stepper: seqpar.hf.Stepper, tokens: int) -> float:
    """Seconds of a step of one prompt of so many tokens."""
    kv, found = stepper.kv, []
    for _ in range(4):
        batch = kv.batch(["lone"], [tokens])
        dist.barrier()
        start = time.perf_counter()
        stepper(batch, torch.full((tokens,), 5), [tokens - 1])
        found.append(time.perf_counter() - start)
        kv.free("lone")
    return statistics.median(found[1:])


class Peer:
    """Transformers' continuous batching, as its manager serves requests that come one by one."""

    def __init__(self, path: Path, arrivals: Sequence[Arrival]) -> None:
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        getLogger("ContinuousBatchingLogger").setLevel(ERROR)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        config = ContinuousBatchingConfig(
            num_blocks=sum(-(-(len(each.prompt) + each.new) // 256) for each in arrivals),  # of its own size
            max_batch_tokens=512,
            max_requests_per_batch=LIVE,
            allow_block_sharing=False,
        )
        greedy = GenerationConfig(do_sample=False, max_new_tokens=max(each.new for each in arrivals))
        self.manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
        with torch.no_grad():
            self.manager.warmup()
        self.manager.start()

    def serve(self, arrivals: Sequence[Arrival], unit_s: float) -> Served:
        """As `serve`; its thread notes when tokens come.

        Raises:
            RuntimeError: a request failed, its thread ended, or took longer than anybody waits.
        """
        found = Served([[] for _ in arrivals], [[] for _ in arrivals], [each.at * unit_s for each in arrivals])
        queue = deque(sorted(enumerate(arrivals), key=lambda each: each[1].at))
        start, left = time.perf_counter(), len(arrivals)
        while left:
            now = time.perf_counter() - start
            while queue and queue[0][1].at * unit_s <= now:
                number, each = queue.popleft()
                options: dict[str, Any] = {"max_new_tokens": each.new, "record_timestamps": True, "eos_token_id": -1}
                self.manager.add_request(list(each.prompt), request_id=str(number), **options)
            wait = queue[0][1].at * unit_s - now if queue else 0.2
            result = self.manager.get_result(timeout=min(0.2, max(1e-4, wait)))
            if result is None:
                if now > PEER_LIMIT_S or not self.manager.is_running():
                    raise RuntimeError(f"{left} of {len(arrivals)} requests without an answer after {now:.0f} s")
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            if result.is_finished():
                number, left = int(result.request_id), left - 1
                found.tokens[number].extend(result.generated_tokens)
                found.times[number].extend(at - start for at in result.timestamps[: len(result.generated_tokens)])
        return found

    def close(self) -> None:
        self.manager.stop(block=True, timeout=10)


def open_peer(path: Path, arrivals: Sequence[Arrival]) -> tuple[Peer | None, str | None]:
    """The peer, or why there is none."""
    try:
        return Peer(path, arrivals), None
    except Exception as failed:  # whatever it is, it is theirs
        return None, f"{type(failed).__name__}: {failed}"


class Fused(NamedTuple):
    """A gap between arrivals, in lone requests: seconds to the last token, fused and by instances, and latencies."""

    gap: float
    fused: Timing
    instances: Timing
    latency_s: tuple[float, float]
    lone_s: float


def flover(
    stepper: seqpar.hf.Stepper, own: seqpar.hf.Stepper, model: Model, group: comm.ProcessGroup, requests: int
) -> list[Fused]:
    """Both sides use both cores: one loop over the ranks, or an instance on each, which takes every other request."""
    itself = comm.groups(comm.init_mesh(tp=1, sp=1)).flat
    rank, ranks = group.rank(), group.size()
    new, vocab_size = model.fused_new, stepper.vocab_size
    everyone: Policy = StallFree(max(model.tau, requests * 2))
    lone_s = (
        serve_all(own, [Arrival(0.0, (3, 4, 5, 6, 7, 8, 9, 10), new)] * 3, 1.0, FullHybrid(), 1, itself).seconds / 3
    )
    lone_s = float(comm.broadcast(torch.tensor([lone_s], dtype=torch.float64), src=0, group=group)[0])
    results = []
    for gap in model.gaps:
        arrivals = poisson(requests, gap, new, vocab_size)
        mine = arrivals[rank::ranks]
        seconds: dict[str, list[float]] = {"fused": [], "instances": []}
        latency: dict[str, list[float]] = {"fused": [], "instances": []}
        margins = Margins(own)
        for turn in range(model.rounds[2]):
            progress(turn, model.rounds[2], f"{model.name}: {requests} requests, {gap:g} of a request between them")
            function = own if turn else margins
            through_own = through(function, own.kv, vocab_size, mine, lone_s, FullHybrid(), 1, itself)
            assert through_own is not None, "an instance is alone"
            parts: list[Any] = [None] * ranks
            dist.all_gather_object(parts, (through_own, margins.found))
            fused = through(stepper, stepper.kv, vocab_size, arrivals, lone_s, everyone, requests, group)
            if fused is None:
                continue
            alone, close = joined(parts, requests)
            compare(f"{model.name}, fused", fused, alone, close)
            for name, run in (("fused", fused), ("instances", alone)):
                seconds[name].append(run.seconds)
                whole = [times[-1] - at for times, at in zip(run.times, run.arrived, strict=True)]
                latency[name].append(statistics.fmean(whole))
        if not rank:
            timings = (Timing(name, tuple(times)) for name, times in seconds.items())
            both = (statistics.median(latency["fused"]), statistics.median(latency["instances"]))
            results.append(Fused(gap, *timings, both, lone_s))
    progress(1, 1, f"{model.name}: fused requests")
    return results


def joined(parts: Sequence[tuple[Served, list[float]]], requests: int) -> tuple[Served, list[list[float]]]:
    """What instances served, as one: request i was number i // ranks of instance i mod ranks."""
    whole = Served([], [], [])
    left = [iter(found) for _, found in parts]
    close = []
    for number in range(requests):
        at, which = divmod(number, len(parts))
        run = parts[which][0]
        whole.tokens.append(run.tokens[at])
        whole.times.append(run.times[at])
        whole.arrived.append(run.arrived[at])
        close.append([next(left[which]) for _ in run.tokens[at]])
    return whole, close


def serve_all(
    stepper: seqpar.hf.Stepper,
    arrivals: Sequence[Arrival],
    unit_s: float,
    policy: Policy,
    live: int,
    group: comm.ProcessGroup,
) -> Served:
    found = through(stepper, stepper.kv, stepper.vocab_size, arrivals, unit_s, policy, live, group)
    assert found is not None, "this rank leads"
    return found


class Found(NamedTuple):
    """What one model on some ranks gave."""

    model: str
    ranks: int
    piggyback: list[Piggyback]
    policies: Policies | None
    fused: list[Fused]


@torch.no_grad()
def measure(model: Model, path: Path, parts: Sequence[str], requests: int) -> Found:
    """All parts of one model, on the ranks that there are."""
    ranks = dist.get_world_size()
    mesh = comm.init_mesh(tp=ranks, sp=1, device="cpu")
    group = comm.groups(mesh).flat
    loaded = seqpar.hf.load(path, mesh, dtype=torch.float32, progress=False)
    stepper = seqpar.hf.Stepper(loaded, num_pages=2 * LIVE + 1, page_size=PAGE)
    mixed = piggyback(stepper, model) if "piggyback" in parts else []
    run = policies(stepper, model, group, path, requests) if "policies" in parts else None
    fused = []
    if "flover" in parts and ranks > 1:
        instance = seqpar.hf.load(path, comm.init_mesh(tp=1, sp=1, device="cpu"), dtype=torch.float32, progress=False)
        own = seqpar.hf.Stepper(instance, num_pages=1, page_size=PAGE)
        fused = flover(stepper, own, model, group, 2 * requests)
    return Found(model.name, ranks, mixed, run, fused)


def host(rounds: int) -> dict[str, Timing]:
    """Processor time of composing and building steps of 256 requests, of decodes and of decodes with prompts."""
    found = {}
    for name, queue, tau in (("256 decodes", 0, 256), ("256 decodes and two chunks, 64 waiting", 64, 512)):
        kv = PagedKV(1, 256 * 160, 16, 1, 8)
        draw, budget = random.Random(0), Budget(MOST_TOKENS, 320)
        running = [Progress(i, draw.randint(100, 1000), 2000) for i in range(256)]
        waiting = deque(Progress(256 + i, 200, 400) for i in range(queue))
        kv.batch([each.id for each in running], [each.tokens - 1 for each in running])
        for each in running:
            each.scheduled = each.computed = each.tokens - 1
        times = []
        for _ in range(rounds):
            start = time.thread_time()
            step = compose(running, waiting, budget, StallFree(tau), Room.of(kv))
            batch = step.build(kv)
            times.append(time.thread_time() - start)
            if step.num_decodes != 256 or len(set(batch.slots.tolist())) != batch.num_tokens:
                raise WrongResultError(f"{name}: a step of {step.num_decodes} decodes, or a slot written twice")
            for request in step.ids:
                if request < 256:
                    running[request].scheduled = running[request].computed = running[request].tokens
                    running[request].tokens += 1
                else:
                    kv.free(request)  # so that all rounds compose the same
        found[name] = Timing(name, tuple(times))
    return found


# The report.


def paired(name: str, ours: Timing, theirs: Timing, target: float | None = None, *, most: bool = True) -> Row:
    """Ours in units of theirs; a target is the most, or the least."""
    found = ratio(ours, theirs)
    ok = None if target is None else (found.value <= target if most else found.value >= target)
    return Row(name, found.value, "x", target, ok, (found.low, found.high))


def seconds_of(runs: Sequence[Served], metric: Callable[[Served], float]) -> Timing:
    return Timing("", tuple(metric(run) for run in runs))


def rows_of(found: Found) -> list[Row]:
    label = f"{found.model}, {found.ranks} rank{'s' * (found.ranks > 1)}"
    rows = []
    for each in found.piggyback:
        target = PIGGYBACK if each.alone == 4 else None  # of Table 2: 4 decodes
        rows.append(paired(f"{label}: {each.name}: a decode ÷ alone", *each.marginal_s(), target))
    if found.policies is not None:
        rows += policy_rows(label, found.policies.served)
    for fused in found.fused:
        name = f"{label}: fused, {fused.gap:g} of a request between arrivals: instances ÷ fused"
        rows.append(paired(name, fused.instances, fused.fused))
    return rows


def policy_rows(label: str, served: dict[str, list[Served]]) -> list[Row]:
    rows = []
    seconds = {name: seconds_of(runs, lambda run: run.seconds) for name, runs in served.items()}
    worst = {name: seconds_of(runs, lambda run: max(run.gaps_s)) for name, runs in served.items()}
    for name in served:
        if name != ALONE:
            target = THROUGHPUT if name == "StallFree" else None
            rows.append(
                paired(f"{label}: {name}: throughput ÷ {ALONE}", seconds[ALONE], seconds[name], target, most=False)
            )
    for name in ("RequestLevel", PEER):
        if name in served:
            rows.append(paired(f"{label}: StallFree: throughput ÷ {name}", seconds[name], seconds["StallFree"]))
    for name in served:
        if name not in (ALONE, "PrefillFirst"):
            target = WORST_TBT if name == "StallFree" else None
            rows.append(
                paired(f"{label}: {name}: worst TBT ÷ PrefillFirst", worst[name], worst["PrefillFirst"], target)
            )
    return rows


def host_rows(timings: dict[str, Timing]) -> list[Row]:
    rows = []
    for name, timing in timings.items():
        found = ratio(timing, Timing("ms", (1e-3,) * len(timing.rounds)))
        ok = found.value <= HOST_MS
        rows.append(Row(f"host: compose and build, {name}", found.value, "ms", HOST_MS, ok, (found.low, found.high)))
    return rows


def tables(found: Sequence[Found], rows: Sequence[Row]) -> str:
    """Absolute numbers of each part, then the ratios."""
    lines = [
        "| model, ranks | step | prompt alone, ms | decodes alone, ms | together, ms |",
        "|---|---|---:|---:|---:|",
    ]
    for each in found:
        for mix in each.piggyback:
            cells = " | ".join(f"{timing.median_ms:.4g}" for timing in (mix.prompt, mix.decode, mix.mixed))
            lines.append(f"| {each.model}, {each.ranks} | {mix.tokens} tokens, {mix.alone - 1} decodes | {cells} |")
    lines += ["", "| model, ranks | | tokens/s | median TBT, ms | worst TBT, ms | median TTFT, ms | live |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for each in found:
        for name, runs in (each.policies.served if each.policies else {}).items():
            values = [
                statistics.median(run.tokens_per_s for run in runs),
                *(1e3 * statistics.median(statistics.median(run.gaps_s) for run in runs),),
                *(1e3 * statistics.median(max(run.gaps_s) for run in runs),),
                *(1e3 * statistics.median(statistics.median(run.first_s) for run in runs),),
            ]
            live = f"{runs[0].live:.1f}" if runs[0].steps else ""
            cells = " | ".join(f"{value:.4g}" for value in values)
            lines.append(f"| {each.model}, {each.ranks} | {name} | {cells} | {live} |")
        if each.policies and each.policies.error:
            lines.append(f"| {each.model}, {each.ranks} | {PEER} | did not run: {each.policies.error} | | | | |")
    lines += ["", "| model | gap ÷ a request | fused, s | instances, s | mean latency, s | published |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for each in found:
        for fused in each.fused:
            cells = f"{fused.fused.median_ms / 1e3:.3g} | {fused.instances.median_ms / 1e3:.3g}"
            both = f"{fused.latency_s[0]:.3g}, {fused.latency_s[1]:.3g}"
            lines.append(f"| {each.model} | {fused.gap:g} | {cells} | {both} | {PUBLISHED[fused.gap]:g} x |")
    lines += ["", "| | value | 95 % interval | target | |", "|---|---:|:---:|---:|---|"]
    for row in rows:
        low, high = row.interval or (row.value, row.value)
        bound = "" if row.target is None else f"{'≥' if 'throughput' in row.name else '≤'} {row.target:g}"
        verdict = {None: "", True: "met", False: "**missed**"}[row.ok]
        lines.append(f"| {row.name} | {row.value:.3g} {row.unit} | {low:.3g} to {high:.3g} | {bound} | {verdict} |")
    return "\n".join(lines)


def picture(path: Path, found: Sequence[Found], machine: str) -> None:
    """Throughput by worst TBT of every policy, a panel for each model and number of ranks; piggybacked decodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(found), figsize=(4.2 * len(found), 7), layout="constrained", squeeze=False)
    for (users, steps), each in zip(grid.T, found, strict=True):
        users.set_title(f"{each.model}, {each.ranks} rank{'s' * (each.ranks > 1)}", fontsize=10, loc="left")
        for name, runs in (each.policies.served if each.policies else {}).items():
            x = 1e3 * statistics.median(max(run.gaps_s) for run in runs)
            y = statistics.median(run.tokens_per_s for run in runs)
            users.plot(x, y, "o")
            users.annotate(name, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
        users.set(xscale="log", yscale="log", xlabel="worst time between tokens, ms", ylabel="tokens/s")
        bars = [(f"{mix.tokens} tokens,\n{mix.alone - 1} decodes", ratio(*mix.marginal_s())) for mix in each.piggyback]
        bars += [(f"instances,\ngap {fused.gap:g}", ratio(fused.fused, fused.instances)) for fused in each.fused]
        for at, (_, value) in enumerate(bars):
            steps.bar(at, value.value, color="tab:blue" if at < len(each.piggyback) else "tab:orange")
            steps.plot((at, at), (value.low, value.high), color="black", linewidth=1)
        steps.axhline(PIGGYBACK, color="black", linestyle=":", linewidth=0.8)
        steps.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
        steps.set_title("a piggybacked decode ÷ alone (blue), fused ÷ instances", fontsize=8, loc="left")
    figure.suptitle(machine, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def storable(found: Found) -> dict[str, Any]:
    """All that was measured of a model, for the JSON file."""
    run = found.policies
    return {
        "model": found.model,
        "ranks": found.ranks,
        "piggyback": [
            {"tokens": mix.tokens, "alone": mix.alone}
            | {timing.name: timing.rounds for timing in (mix.prompt, mix.decode, mix.mixed)}
            for mix in found.piggyback
        ],
        "policies": None
        if run is None
        else {
            "unit_s": run.unit_s,
            "peer_error": run.error,
            "tokens_not_compared": run.uncompared,
            "rounds": {
                name: [
                    {"seconds": one.seconds, "tokens_per_s": one.tokens_per_s, "worst_tbt_s": max(one.gaps_s)}
                    | {"median_tbt_s": statistics.median(one.gaps_s), "median_ttft_s": statistics.median(one.first_s)}
                    | {"steps": one.steps, "mean_live": one.live}
                    for one in runs
                ]
                for name, runs in run.served.items()
            },
        },
        "flover": [
            {"gap": each.gap, "lone_request_s": each.lone_s, "fused_s": each.fused.rounds}
            | {"instances_s": each.instances.rounds, "mean_latency_s": each.latency_s}
            for each in found.fused
        ],
    }


def parse() -> argparse.Namespace:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    return arguments.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    rows: list[Row] = []
    found: list[Found] = []
    if "host" in args.only:
        try:
            rows += host_rows(host(50 if args.quick else 400))
        except WrongResultError as error:
            print(f"WRONG RESULT: {error}", file=sys.stderr)
            sys.exit(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models if {*args.only} - {"host"} else ():
            model, path = quick(MODELS[name]) if args.quick else MODELS[name], CHECKPOINT
            if model.name == LARGE.name:
                path = Path(folder)
                random_weights(path)
            for ranks in args.ranks:
                requests = 8 if args.quick else LIVE
                found.append(launch(ranks, measure, model, path, args.only, requests))
    rows = [row for each in found for row in rows_of(each)] + rows
    about = meta(
        args.machine,
        PACKAGES,
        quick=args.quick,
        threads_per_rank=1,
        dtype="float32",
        layout="tp over all ranks",
        models={each.name: each._asdict() for each in MODELS.values()},
        live_requests=LIVE,
        page_size=PAGE,
        context=CONTEXT,
        found=[storable(each) for each in found],
    )
    plot, args.plot = args.plot, None
    block = "" if BUNDLED.name in args.models else ", ".join(args.models)  # beside the bundled one's on the page
    report(args, about, rows, "what runs together in a step", tables(found, rows), block=block)
    if plot and found:
        picture(plot, found, f"{args.machine}, {about['date']}")


if __name__ == "__main__":
    main()
