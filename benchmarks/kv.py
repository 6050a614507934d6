"""What caches cost the host: room for a step, hashing, plans of moves, moving, saving; one process, no model.

Times are the fastest of several rounds: what the code costs, not what else the machine does. Everything moved, saved or
found is compared with what it was, bit for bit, and a difference ends the run with exit status 1 and no numbers.

Moves per finished request: requests of 1 to 200 steps come one by one to the end of a run of slots, or to its front
where the slots are at an end, and after every step the run is made whole again by each strategy.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Row, WrongResultError, meta, parser, report
from torch import Tensor

from seqpar.kv import PagedKV, SavedKV, compaction, page_keys

LAYERS, HEADS, DIM, ROOM, USED = 16, 8, 64, 2048, 256


def best_s(run: Callable[[], object], rounds: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest round."""
    found = []
    for _ in range(rounds):
        prepare()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def same(what: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    if not all(torch.equal(a, b) for a, b in pairs):
        raise WrongResultError(f"{what}: other bits than before")


def bookkeeping(rounds: int) -> list[Row]:
    """What a step of 256 decodes costs before its first kernel, and what finding a prompt costs."""
    kv, ids = PagedKV(1, 256 * 80, 16, 1, 8), list(range(256))
    kv.batch(ids, [random.Random(0).randint(1, 1000) for _ in ids])
    ones, tokens = dict.fromkeys(ids, 1), list(range(100_000))
    rows = [
        Row("room for 256 decodes (`reserve`)", 1e3 * best_s(lambda: kv.reserve(ones), rounds), "ms"),
        Row(
            "the same with the batch's tensors (`batch`)", 1e3 * best_s(lambda: kv.batch(ids, [1] * 256), rounds), "ms"
        ),
    ]
    for size in (16, 256):
        seconds = best_s(lambda size=size: list(page_keys(tokens, size, b"")), rounds)
        rows.append(Row(f"hashing a token of a prompt, {size} a page", 1e6 * seconds / len(tokens), "us"))
    return rows


def plans(rounds: int) -> list[Row]:
    rng = random.Random(0)
    occupied = [rng.random() < 0.8 for _ in range(256)]
    return [
        Row(
            f'a plan of 256 slots, "{strategy}"',
            1e6 * best_s(lambda s=strategy: compaction.plan(occupied, s), rounds),
            "us",
        )
        for strategy in ("window", "tail", "stable")
    ]


def moves_per_finish(strategy: compaction.Strategy, num_slots: int, rate: float, steps: int) -> float:
    """Slots moved for each request that has finished; in a slot stands how many steps it has yet to go."""
    rng, slots, moves, finished = random.Random(1), [0] * num_slots, 0, 0
    for _ in range(steps):
        run = compaction.plan([left > 0 for left in slots], "none")
        at = run.start + run.size if run.start + run.size < num_slots else run.start - 1
        if rng.random() < rate and at >= 0:
            slots[at] = rng.randint(1, 200)
        finished += slots.count(1)
        slots = [max(0, left - 1) for left in slots]
        plan = compaction.plan([left > 0 for left in slots], strategy)
        moves += len(plan.moves)
        moved, live = plan.reorder(slots), range(plan.start, plan.start + plan.size)
        if sorted(moved[slot] for slot in live) != sorted(left for left in slots if left):
            raise WrongResultError(f"{strategy}: requests were lost")
        slots = [moved[slot] if slot in live else 0 for slot in range(num_slots)]
    return moves / finished


def filled(requests: int) -> PagedKV:
    kv = PagedKV.contiguous(LAYERS, requests, ROOM, HEADS, DIM, dtype=torch.bfloat16)
    batch = kv.batch(range(requests), [USED] * requests)
    for layer in range(LAYERS):
        kv.append(layer, *torch.randn(2, batch.num_tokens, HEADS, DIM).bfloat16(), batch)
    return kv


def moving(rounds: int) -> list[Row]:
    """One slot of a cache of 64 by its used part and whole, and a request that leaves and comes back."""
    kv = filled(64)
    away = SavedKV.of(kv, 63)
    plan = compaction.CompactionPlan(0, ((63, 5),), 63, 64)

    def move(lengths: list[int]) -> None:
        for layer in range(LAYERS):
            for tensor in kv.layer(layer):
                plan.apply(tensor, lengths=lengths)

    seconds = [best_s(lambda n=n: move([n] * 64), rounds) for n in (USED, ROOM)]
    same("moved", list(zip(kv.gather(0, [5]), (away.k[0], away.v[0]), strict=True)))
    kv.free(5)

    def restore() -> None:
        away.restore(kv, "back")

    bytes_per_s = [("saving a request in host memory", away.nbytes / best_s(lambda: SavedKV.of(kv, 63), rounds))]
    again = best_s(restore, rounds, lambda: "back" in kv and kv.free("back"))
    same("restored", list(zip(kv.gather(1, ["back"]), (away.k[1], away.v[1]), strict=True)))
    bytes_per_s.append(("restoring it", away.nbytes / again))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.safetensors"
        bytes_per_s.append(("writing it to a file", away.nbytes / best_s(lambda: away.write(path), rounds)))
        bytes_per_s.append(("reading the file", away.nbytes / best_s(lambda: SavedKV.read(path), rounds)))
        same("read", [(SavedKV.read(path).k, away.k), (SavedKV.read(path).v, away.v)])
    return [
        Row(f"moving {USED} used tokens of one slot, {LAYERS} layers", 1e3 * seconds[0], "ms"),
        Row(f"moving the slot of {ROOM} whole", 1e3 * seconds[1], "ms"),
        *(Row(f"{what} ({away.nbytes / 1e6:.1f} MB)", rate / 1e9, "GB/s") for what, rate in bytes_per_s),
    ]


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds, steps = (5, 1_000) if args.quick else (30, 6_000)
    try:
        rows = bookkeeping(rounds) + plans(rounds) + moving(rounds)
        for num_slots, rate in ((64, 0.3), (64, 0.5), (256, 0.95)):
            for strategy in ("window", "tail", "stable"):
                name = f'moves per finish, {num_slots} slots, {rate} arrivals a step, "{strategy}"'
                rows.append(Row(name, moves_per_finish(strategy, num_slots, rate, steps), ""))
    except WrongResultError as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        sys.exit(1)
    lines = ["| | |", "|---|---:|", *(f"| {row.name} | {row.value:.3g} {row.unit} |" for row in rows)]
    report(args, meta(args.machine, ("seqpar", "torch")), rows, "what caches cost the host", "\n".join(lines))


if __name__ == "__main__":
    main()
