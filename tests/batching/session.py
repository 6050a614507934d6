"""Histories of a loop as data: drawn in one process, played on any ranks, and checked after every step."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqpar import comm
from seqpar.batching import (
    Budget,
    Emitted,
    Generation,
    PipelineFusion,
    Request,
    Sampling,
    Spread,
    StageFunction,
    StallFree,
    Step,
    StepFunction,
    TemporalFusion,
)
from seqpar.hf import Stepper, load, load_stage, parallelize
from seqpar.kv import PagedKV, SlotTable, compaction
from seqpar.ragged import RaggedBatch
from tests.batching.test_compose import MAKE
from tests.batching.toy import VOCAB, ToyStage, alone, one_stage
from tests.hf.tiny import exact_norms, tiny_model

CHECKPOINT = Path(__file__).parent.parent.parent / "examples" / "tiny-llama"
CUT, TAIL, NEW = 12, 3, 10
"""The most tokens of a trunk, after it, and generated."""

LONGEST = CUT + TAIL + NEW - 1

WAYS: list[dict[str, Any]] = [
    {},
    {"stop_tokens": [3, 11, 17, 28]},
    {"stop_strings": ["a", "\u00e9b", "e f"]},
    {"stop_strings": ["\u20ac", "fgh", "d c"]},
    {"sampling": (0.8, None, 1.0, 5)},
    {"sampling": (1.5, 6, 0.7, 9), "stop_tokens": [2]},
]
GREEDY = 4
"""How many of them, the first, take the likeliest token."""

_PIECES = [bytes([97 + i]) for i in range(12)] + [b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b" c", b" f", b"\xff"]


def say(tokens: Sequence[int]) -> str:
    """Text whose characters lie across tokens."""
    return b"".join(_PIECES[token % len(_PIECES)] for token in tokens).decode("utf-8", "replace")


@dataclass(frozen=True)
class Setup:
    """A loop, as names and numbers."""

    policy: str = "stall-free"
    page_size: int = 3
    more_pages: int = 3
    max_tokens: int = 8
    max_requests: int = 4
    admission: Any = "known"
    spare_pages: int = 0
    preemption: Any = "recompute"
    compaction: Any = "none"
    share_prefixes: bool = True
    leads: bool = False
    depth: int = 0
    """Steps in flight of a model in stages; 0 for the loop that knows no stages."""


class Case(Protocol):
    """A model, its trunks (prompts begin with a part of one), and what it says of a request that is alone."""

    vocab_size: int
    trunks: Sequence[Sequence[int]]
    ways: int

    def make(self, num_pages: int, page_size: int) -> tuple[StepFunction, PagedKV]: ...

    def alone(self, request: Request) -> tuple[list[int], str]: ...


class ToyCase:
    """The model of a few lines, which is a stage of its own."""

    vocab_size, ways = VOCAB, len(WAYS)
    trunks = tuple([(5 * trunk + 3 * i + i * i) % VOCAB for i in range(CUT)] for trunk in range(3))

    def make(self, num_pages: int, page_size: int) -> tuple[StepFunction, PagedKV]:
        toy = ToyStage(num_pages, page_size, one_stage())
        return toy, toy.kv

    def alone(self, request: Request) -> tuple[list[int], str]:
        return alone(request, say)


class ModelCase:
    """A Transformers model over a mesh; alone it is Transformers' own, in one process, without a cache."""

    ways = GREEDY

    def __init__(self, model: Any, reference: Any, trunks: Sequence[Sequence[int]]) -> None:
        self.model, self.reference, self.trunks = model, reference, trunks
        self.vocab_size = reference.config.vocab_size
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    def make(self, num_pages: int, page_size: int) -> tuple[StepFunction, PagedKV]:
        stepper = Stepper(self.model, num_pages=num_pages, page_size=page_size)
        return stepper, stepper.kv

    @torch.no_grad()
    def alone(self, request: Request) -> tuple[list[int], str]:
        tokens = self._greedy.setdefault(tuple(request.prompt), [])
        while len(tokens) < request.max_new_tokens:
            known = torch.tensor([[*request.prompt, *tokens]])
            tokens.append(int(self.reference(known, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()))
        for count, token in enumerate(tokens[: request.max_new_tokens], 1):
            if token in request.stop_tokens:
                return tokens[:count], "stop_token"
            if any(stop in say(tokens[:count]) for stop in request.stop_strings):
                return tokens[:count], "stop_string"
        return tokens[: request.max_new_tokens], "length"


class StageCase(ModelCase):
    """The same, of which every rank has a stage; the cache is made anew, the weights are not."""

    def make(self, num_pages: int, page_size: int) -> tuple[StepFunction, PagedKV]:
        old: PagedKV = self.model.kv
        self.model.kv = PagedKV(old.num_layers, num_pages, page_size, old.num_kv_heads, old.head_dim, dtype=old.dtype)
        return self.model, self.model.kv


_CASES: dict[Any, ModelCase] = {}


def case_on(mesh: comm.DeviceMesh, kind: str, options: Mapping[str, Any]) -> Case:
    """A case of that kind in a rank, made once: "toy", "tiny" (random weights), "bundled", "stages" (of it)."""
    if kind == "toy":
        return ToyCase()
    key = (id(mesh), kind, repr(sorted(options.items())))
    if key not in _CASES:
        _CASES[key] = {"tiny": _tiny, "bundled": _bundled, "stages": _stages}[kind](mesh, options)
    return _CASES[key]


def _tiny(mesh: comm.DeviceMesh, options: Mapping[str, Any]) -> ModelCase:
    model, reference = (tiny_model("llama", num_hidden_layers=2) for _ in range(2))
    parallelize(model, mesh, **options)
    return ModelCase(model, exact_norms(reference), ToyCase.trunks)


def _stages(mesh: comm.DeviceMesh, options: Mapping[str, Any]) -> ModelCase:
    how: dict[str, Any] = {"dtype": torch.float64, "progress": False, **options}
    return StageCase(load_stage(CHECKPOINT, mesh, num_pages=1, page_size=1, **how), *_references())


def _bundled(mesh: comm.DeviceMesh, options: Mapping[str, Any]) -> ModelCase:
    return ModelCase(load(CHECKPOINT, mesh, dtype=torch.float64, progress=False, **options), *_references())


def _references() -> tuple[Any, list[list[int]]]:
    """The bundled model in one process, and trunks of real text."""
    reference = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    texts = (
        "class Stack:\n    def __init__(self, items):\n        self.",
        "import os\nimport sys\nfrom typing import Any\n\n",
    )
    trunks = [tokenizer(text * 2).input_ids[:CUT] for text in (*texts, "return [x for x in range(10)]\n")]
    return exact_norms(reference), trunks


class InjectedError(Exception):
    """What a model that is told to fails with."""


class Watch:
    """A model that looks at every step before it runs it, and fails when it is told to."""

    def __init__(self, model: StepFunction, kv: PagedKV) -> None:
        self.model, self.kv = model, kv
        self.calls = 0
        self.fails: str | None = None
        self.log: list[tuple[Any, ...]] = []

    @property
    def stages(self) -> comm.Stages:
        stages: comm.Stages = getattr(self.model, "stages")  # noqa: B009
        return stages

    def __call__(self, batch: RaggedBatch, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        if self.fails == "before":
            raise InjectedError
        self.look(batch)
        logits = self.model(batch, tokens, rows)
        if self.fails == "after":
            raise InjectedError
        self.count(batch, rows)
        return logits

    def steps(self, batch: RaggedBatch, tokens: Tensor, rows: Sequence[int]) -> comm.Steps[Tensor | comm.Handle]:
        self.look(batch)
        self.count(batch, rows)  # when it begins: the loop counts it then
        assert isinstance(self.model, StageFunction)
        return (yield from self.model.steps(batch, tokens, rows))

    def look(self, batch: RaggedBatch) -> None:
        slots = batch.slots.tolist()
        assert len(set(slots)) == len(slots) == batch.num_tokens, "no slot is written twice"
        assert all(self.kv.holders(slot // batch.page_size) == 1 for slot in slots), "nor what others hold"
        assert all(new > 0 for new in batch.q_lens)

    def count(self, batch: RaggedBatch, rows: Sequence[int]) -> None:
        self.calls += 1
        self.log.append((batch.requests, batch.q_lens, tuple(rows)))


class Session:
    """A loop, what is done to it, and what must hold whatever that is."""

    def __init__(
        self, setup: Setup, case: Case, lead: comm.ProcessGroup | None = None, *, compares: bool = True
    ) -> None:
        self.setup, self.case, self.compares = setup, case, compares
        num_pages = -(-LONGEST // setup.page_size) + setup.more_pages
        model, kv = case.make(num_pages, setup.page_size)
        self.model = Watch(model, kv)
        how: dict[str, Any] = {
            "vocab_size": case.vocab_size,
            "policy": MAKE[setup.policy](),
            "budget": Budget(setup.max_tokens, setup.max_requests, setup.admission, setup.spare_pages),
            "preemption": setup.preemption,
            "share_prefixes": setup.share_prefixes,
            "text": say,
            "lead": lead,
        }
        self.is_piped = setup.depth > 0 and isinstance(model, StageFunction)
        self.loop = (
            PipelineFusion(self.model, kv, depth=setup.depth, **how)
            if self.is_piped
            else TemporalFusion(self.model, kv, compaction=setup.compaction, **how)
        )
        self.live: dict[int, Generation] = {}
        self.streams: dict[int, tuple[list[int], list[str]]] = {}
        self.ended = WeakSet[Generation]()
        self.served = self.cancelled = self.preempted = self.failed = self.refused = 0
        self.table, self.state = SlotTable(setup.max_requests), torch.full((setup.max_requests,), -1)
        self.empty = contents(self.loop)

    # What is done to it.

    def act(self, action: tuple[Any, ...]) -> None:
        """One action: its name and its numbers."""
        name, *numbers = action
        getattr(self, name)(*numbers)

    def add(self, trunk: int, cut: int, tail: int, new: int, way: int) -> None:
        """A request whose prompt begins as others' do."""
        number = self.served + self.cancelled + len(self.live)
        self.live[number] = self.loop.add(self.request(number, trunk, cut, tail, new, way))
        self.streams[number] = ([], [])

    def request(self, number: int, trunk: int, cut: int, tail: int, new: int, way: int) -> Request:
        options = dict(WAYS[way % self.case.ways])
        if "sampling" in options:
            options["sampling"] = Sampling(*options["sampling"])
        prompt = [*self.case.trunks[trunk][: max(cut, int(not tail))], *self.case.trunks[2][tail : 2 * tail]]
        return Request(number, prompt, new, **options)

    def cancel(self, which: int) -> None:
        """One of those that are live and have not been cancelled yet."""
        there = [number for number in self.loop.live if number not in self.loop._leaving]
        if there:
            self.loop.cancel(there[which % len(there)])

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def fail(self, when: str) -> None:
        """A step that runs out of memory, say, before the model or behind it; a pipeline would not survive it."""
        if self.is_piped:
            return
        steps, before = self.loop.steps, {number: list(each.tokens) for number, each in self.live.items()}
        self.model.fails = when
        try:
            emitted = self.loop.step()
        except InjectedError:
            self.failed += 1
            emitted = ()
        finally:
            self.model.fails = None
        assert self.loop.steps == steps and not any(each.token is not None for each in emitted)
        assert all(before[number] == each.tokens for number, each in self.live.items())
        self.take(emitted)
        self.check()

    def refuse(self) -> None:
        """What can never run, or is unknown, is refused, and nobody else notices."""
        loop, before = self.loop, self.snapshot()
        good = self.request(-1, 0, 4, 1, 3, 0)
        calls: list[Callable[[], object]] = [
            lambda: loop.add(Request(-1, [0] * CUT, 10**6)),
            lambda: loop.add(Request(-1, [self.case.vocab_size], 1)),
            lambda: loop.add(Request(-1, [], 1)),
            lambda: loop.add(Request(-1, [0], 1, Sampling(top_p=2.0))),
            lambda: loop.cancel(-1),
        ]
        if loop.live:
            calls.append(lambda: loop.add(Request(loop.live[0], good.prompt, 3)))
        for call in calls:
            with pytest.raises(ValueError, match="must"):
                call()
        self.refused += len(calls)
        assert self.snapshot() == before

    def step(self) -> None:
        """An iteration, and all that must hold after it."""
        loop, steps, calls = self.loop, self.loop.steps, self.model.calls
        decodes = {each.id for each in loop.running if each.tokens - each.scheduled == 1 and each.scheduled}
        emitted = loop.step()
        assert loop.steps - steps == self.model.calls - calls <= 1, "one forward, whatever the mix"
        if loop.steps > steps and loop.latest is not None:
            left = {each.id for each in emitted if each.finish == "cancelled"}
            self.check_plan(loop.latest, decodes - left)
        self.take(emitted)
        self.check()

    def finish(self) -> None:
        """Let all that is live end; then nothing is left."""
        for _ in range(3000):
            if not self.loop.live:
                break
            self.step()
        assert not self.loop.live and not self.live, "all end"
        self.step()
        self.check_empty()

    # What must hold.

    def check_plan(self, plan: Step, decodes: set[Any]) -> None:
        policy = self.loop.policy
        policy = policy.policy if isinstance(policy, Spread) else policy
        self.preempted += len(plan.preempted)
        assert plan.num_tokens <= self.setup.max_tokens and not (plan.preempted and plan.admitted)
        assert self.setup.admission != "whole" or not plan.preempted
        if isinstance(policy, StallFree):
            assert plan.num_tokens <= policy.tau
            if (
                not self.is_piped
                and self.setup.admission == "whole"
                and len(decodes) <= min(policy.tau, self.setup.max_tokens)
            ):
                assert decodes <= set(plan.ids), "no decode is left out"

    def check(self) -> None:
        """Between the steps the loop, its cache and whoever follows their rows agree."""
        loop, kv = self.loop, self.loop.kv
        kv.integrity()
        held = {page for request in kv.ids for page in kv.pages(request)}
        assert kv.free_pages + len(held) == kv.num_pages, "used and free are all"
        assert set(kv.ids) == {each.id for each in loop.running} and len(loop.running) <= self.setup.max_requests
        for each in loop.running:
            assert each.computed <= each.scheduled == kv.length(each.id) <= len(kv.pages(each.id)) * kv.page_size
            assert self.is_piped or each.computed == each.scheduled, "nothing is in flight"
            assert each.scheduled <= each.tokens <= each.limit + 1
        for each in loop.waiting:
            assert each.computed == each.scheduled < each.tokens
            assert each.id not in loop._saved or each.scheduled == loop._saved[each.id].length
        for number, generation in self.live.items():
            self.listen(number, generation)
        self.keep_rows({each.id for each in loop.running})

    def keep_rows(self, running: set[Any]) -> None:
        """State in a row for each request that runs, brought together when some have left."""
        gone = set(self.table.ids) - running
        for request in gone:
            self.table.release(request)
        if gone:
            plan = compaction.plan(self.table.occupied, self.setup.compaction)
            plan.apply(self.state)
            self.table.follow(plan)
        for request in sorted(running - set(self.table.ids)):
            self.state[self.table.acquire(request)] = request
        assert self.state[list(self.table.rows(self.table.ids))].tolist() == list(self.table.ids)

    def take(self, emitted: Sequence[Emitted]) -> None:
        """Deal out what was emitted; compare what has ended with what it is alone."""
        self.model.log.append(tuple(emitted))
        for each in emitted:
            assert isinstance(each.id, int)
            if each.token is not None:
                self.streams[each.id][0].append(each.token)
            if each.finish is not None:
                self.verify(each.id, self.live[each.id])
                self.ended.add(self.live.pop(each.id))
                del self.streams[each.id]

    def listen(self, number: int, generation: Generation) -> None:
        """Text is added to, never taken back."""
        pieces, text = self.streams[number][1], generation.text
        given = "".join(pieces)
        assert text.startswith(given)
        pieces.append(text[len(given) :])

    def verify(self, number: int, generation: Generation) -> None:
        request = generation.request
        tokens, finish = self.case.alone(request) if self.compares else (generation.tokens, generation.finish)
        self.listen(number, generation)
        streamed, pieces = self.streams[number]
        assert streamed == generation.tokens, "streamed as they come"
        if generation.finish == "cancelled":
            self.cancelled += 1
            tokens = tokens[: len(generation.tokens)]
            assert generation.tokens == tokens
        else:
            self.served += 1
            assert (generation.tokens, generation.finish) == (tokens, finish), (request, self.setup)
        text = say(tokens[:-1] if generation.finish == "stop_token" else tokens)
        stops = [text.index(stop) for stop in request.stop_strings if stop in text]
        assert "".join(pieces) == text[: min(stops, default=len(text))], "no stop string is ever told"

    def check_empty(self) -> None:
        """Nothing is left of all that was."""
        loop, kv = self.loop, self.loop.kv
        assert not kv.ids and kv.free_pages == kv.num_pages, "pages"
        assert self.table.num_free == self.setup.max_requests, "slots"
        names = 2 * len(kv._allocator.remembered)  # of pages by keys, and of keys by pages
        assert contents(loop) - names == self.empty, "nothing grows"

    def snapshot(self) -> tuple[Any, ...]:
        loop = self.loop
        return loop.live, [vars_of(each) for each in (*loop.running, *loop.waiting)], loop.kv.free_pages, loop.steps


def vars_of(each: Any) -> tuple[Any, ...]:
    return each.id, each.tokens, each.limit, each.scheduled, each.computed, each.served


def contents(loop: TemporalFusion) -> int:
    """Items of all containers that a loop and its cache hold."""
    count, seen, stack = 0, set[int](), list[Any]([loop])
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict | OrderedDict):
            count += len(each)
            stack += [*each.keys(), *each.values()]
        elif isinstance(each, list | deque | set | tuple):
            count += 0 if isinstance(each, tuple) else len(each)
            stack += each
        elif type(each).__module__.startswith("seqpar"):
            names = getattr(type(each), "__slots__", ())
            stack += [*getattr(each, "__dict__", {}).values(), *[getattr(each, name) for name in names]]
    return count


Script = Sequence[tuple[Any, ...]]


def play(
    mesh: comm.DeviceMesh, kind: str, options: Mapping[str, Any], setup: Setup, script: Script
) -> tuple[list[tuple[Any, ...]], int, int]:
    """A script on one rank of several; where one leads, the others only follow."""
    group = comm.stages(mesh).whole if kind == "stages" else comm.groups(mesh).flat
    lead, compares = (group if setup.leads else None), group.rank() == 0  # the others generate what this one does
    session = Session(setup, case_on(mesh, kind, options), lead, compares=compares)
    if setup.leads and group.rank():
        session.loop.follow()
    else:
        for action in script:
            if not (setup.leads and action[0] == "fail"):  # the others would have to be told
                session.act(action)
        session.finish()
        if setup.leads:
            session.loop.close()
    session.check_empty()
    batches = [each for each in session.model.log if not (setup.leads and _is_emitted(each))]
    return batches, session.loop.reused, session.loop.steps


def _is_emitted(entry: tuple[Any, ...]) -> bool:
    """Whether an entry of a log is what was emitted, which those that follow do not write down."""
    return not entry or isinstance(entry[0], Emitted)


def play_random(
    mesh: comm.DeviceMesh, kind: str, options: Mapping[str, Any], setup: Setup, steps: int, seed: int
) -> tuple[dict[str, int], list[tuple[Any, ...]]]:
    """A soak on every rank, with the same random actions."""
    session = soak(setup, case_on(mesh, kind, options), steps, seed)
    gc.collect()
    assert not [each for each in gc.get_objects() if issubclass(type(each), comm.Handle)], "handles"
    return counts(session), session.model.log


def soak(setup: Setup, case: Case, steps: int, seed: int) -> Session:
    """Random admissions, cancellations, failures and refusals over so many steps; now and then all is let end."""
    draw, session = random.Random(seed), Session(setup, case)
    pause = 200
    while session.loop.steps < steps:
        session.act(drawn(draw, len(session.live)))
        if session.loop.steps > pause:
            pause = session.loop.steps + draw.randint(50, 400)
            session.finish()
            gc.collect()
            assert not session.ended, "requests that have ended are kept by nobody"
    session.finish()
    return session


def drawn(draw: random.Random, live: int) -> tuple[Any, ...]:
    kind = draw.random()
    if kind < 0.35 and live < 12:
        cut, tail = draw.randint(0, CUT), draw.randint(0, TAIL)
        new, way = draw.randint(1, NEW), draw.randrange(len(WAYS))
        return "add", draw.randrange(2), cut, tail, new, way
    if kind < 0.40:
        return "cancel", draw.randrange(1 << 10)
    if kind < 0.43:
        return "fail", draw.choice(["before", "after"])
    return ("refuse",) if kind < 0.44 else ("steps", 1)


def counts(session: Session) -> dict[str, int]:
    """What a soak has seen."""
    names = ("served", "cancelled", "preempted", "failed", "refused")
    return {name: getattr(session, name) for name in names} | {
        "steps": session.loop.steps,
        "reused": session.loop.reused,
    }
