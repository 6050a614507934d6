"""Requests that arrive in bursts, and a server that works them off in virtual time: what a rule costs its users.

Every step of the server takes the next token of each running request and as many waiting prompt tokens as its budget
leaves, oldest first (chunked prefill). How long a step takes is the caller's: a function of its number of tokens.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Request", "Service", "bursty", "serve"]

BUDGET = 2048


class Request(NamedTuple):
    """When it comes, how long its prompt is, and how many tokens it wants."""

    arrival_s: float
    prompt: int
    output: int


class Service(NamedTuple):
    """What users saw: medians over requests, and tokens, read and written, from the first arrival to the end."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    steps: tuple[int, ...]


@dataclass
class _Live:
    request: Request
    unread: int
    first_s: float = 0.0
    written: int = 0


def bursty(count: int, tokens_per_s: float, *, seed: int = 0, phase: int = 40) -> list[Request]:
    """Requests in the style of Shift Parallelism's trace: a steady trickle, and bursts far above what can be served.

    Phases of `phase` requests take turns: at a seventh of the load that `tokens_per_s` can carry, and at twice of it.
    Prompts are log-normal around 256 tokens (16 to 2048), outputs geometric around 24 (1 to 96).
    """
    rng = random.Random(seed)
    sizes = [
        (int(min(2048, max(16, rng.lognormvariate(5.5, 0.9)))), int(min(96, 1 + rng.expovariate(1 / 24))))
        for _ in range(count)
    ]
    mean = statistics.fmean(prompt + output for prompt, output in sizes)
    now, requests = 0.0, []
    for number, (prompt, output) in enumerate(sizes):
        load = 1 / 7 if number // phase % 2 == 0 else 2.0
        now += rng.expovariate(load * tokens_per_s / mean)
        requests.append(Request(now, prompt, output))
    return requests


def serve(requests: Sequence[Request], step_s: Callable[[int], float], *, budget: int = BUDGET) -> Service:
    """Work the requests off; a step may hold up to `budget` tokens."""
    waiting, running, done = deque(sorted(requests)), [], []
    now, steps = requests[0].arrival_s, []
    reading: deque[_Live] = deque()
    while waiting or reading or running:
        while waiting and waiting[0].arrival_s <= now:
            request = waiting.popleft()
            reading.append(_Live(request, request.prompt))
        if not reading and not running:
            now = waiting[0].arrival_s
            continue
        room, decoding, finished = budget - len(running), list(running), []
        while reading and room > 0:
            live = reading[0]
            taken = min(room, live.unread)
            live.unread -= taken
            room -= taken
            if live.unread:
                break
            finished.append(reading.popleft())
        steps.append(budget - room)
        now += step_s(budget - room)
        for live in finished:
            live.first_s = now
            running.append(live)
        for live in [*decoding, *finished]:
            live.written += 1
            if live.written >= live.request.output:
                running.remove(live)
                done.append((live, now))
    ttft = [live.first_s - live.request.arrival_s for live, _ in done]
    tpot = [(end - live.first_s) / (live.written - 1) for live, end in done if live.written > 1]
    tokens = sum(request.prompt + request.output for request in requests)
    first = min(request.arrival_s for request in requests)
    return Service(statistics.median(ttft), statistics.median(tpot), tokens / (now - first), tuple(steps))
