"""Sparse attention by policy: exact where nothing is left out, the definitions where something is, bytes, overlap."""

from __future__ import annotations

from itertools import accumulate, chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm, plan
from seqpar.kernels.quantize import decode, encode, encoded_width
from seqpar.kernels.sparse import decode_sketch, encode_sketch, sketch_bytes
from seqpar.kv import StripedKV
from seqpar.layers import CachedKV, CSAAttention, CSAResult, Policy, Strided, TopMass, tokens_to_stripes
from seqpar.layers.csa import seats
from seqpar.partition import HeadMap, RingOrder, Striping, even_ranges
from seqpar.ragged import RaggedBatch
from tests.comm.fakes import Clock
from tests.kernels.own_errors import own_errors
from tests.layers.reference import attend
from tests.layers.test_ring import DIM, HEADS, Case, Timed, expected, inputs, local
from tests.ranks import run_mesh, thinned

LONG = (61, 0, 9, 30)
PAST_LONG = (40, 3, 0, 21)
CASES = [
    Case("contiguous", q_lens=LONG),
    Case("contiguous", q_lens=LONG, window=25),
    Case("zigzag", q_lens=LONG, heads="mha"),
    Case("striped", q_lens=LONG, heads="mqa", interleave=3),
    Case("contiguous", past=PAST_LONG, past_placement="contiguous"),
    Case("zigzag", past=PAST_LONG, window=17, heads="fewer than ranks"),
    Case("striped", q_lens=(1, 1, 0, 2), past=PAST_LONG, heads="gqa"),
    Case("contiguous", q_lens=(2, 1)),
    Case("contiguous", q_lens=(0, 0)),
]


def layer(case: Case, groups: comm.Groups, policy: Policy, **options: Any) -> CSAAttention:
    heads = HeadMap(*HEADS[case.heads])
    options = {"placement": case.placement, "interleave": case.interleave, "window": case.window} | options
    return CSAAttention(heads, DIM, group=groups.sp, policy=policy, **options)


def positions(runs: Any) -> list[int]:
    return [p for run in runs for p in run.positions]


def exact(mesh: comm.DeviceMesh, cases: list[Case], policy: Policy, exchange: str = "ring") -> None:
    groups = comm.groups(mesh)
    for case in cases:
        core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case)
        batch, new, cached = local(case, core, full)
        with torch.no_grad():
            found = core.attend(*new, batch, cached)
            wanted = torch.cat(expected(case, full))[core.rows(batch)]
        torch.testing.assert_close(found.out, wanted, rtol=1e-11, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
        assert found.bound is None
        assert found.rounds == (groups.sp.size() > 1) * (1 if exchange == "ring" else 2)


@pytest.mark.parametrize("ranks", thinned([1, 2, 3, 4], lambda ranks: ranks in (1, 3)))
def test_one_level_of_degree_one_is_exact(ranks: int) -> None:
    run_mesh((1, ranks), exact, CASES, Strided(((ranks, 1),), sinks=0, recent=0))


def test_whole_keys_are_exact() -> None:
    """Sinks, or recent keys, that are all keys leave nothing to sample."""
    run_mesh((1, 3), exact, CASES, Strided(((1, 1), (3, 4)), sinks=200, recent=0))
    run_mesh((1, 3), exact, CASES, Strided(((1, 1), (3, 4)), sinks=0, recent=200))


def by_heads(case: Case, ranks: int) -> bool:
    return HEADS[case.heads][0] >= ranks


@pytest.mark.parametrize("ranks", thinned([1, 2, 3, 4], lambda ranks: ranks == 3))
def test_queries_that_travel_to_their_heads_find_the_same(ranks: int) -> None:
    """Nothing is left out: by one level of degree one, by recent keys that are all, by full coverage."""
    cases = [case for case in CASES if by_heads(case, ranks)]
    assert len(cases) >= 4
    for policy in (Strided(((ranks, 1),), sinks=0, recent=0), TopMass(1.0)):
        run_mesh((1, ranks), exact, cases[::2] if ranks == 3 else cases, policy, "ulysses")
    levels = ((1, 1), (ranks, 4)) if ranks > 1 else ((1, 1),)
    run_mesh((1, ranks), exact, cases[1::2], Strided(levels, sinks=0, recent=200), "ulysses")


def sees(order: RingOrder, rank: int, owner: int) -> bool:
    pairs = zip(order.q[rank], order.kv[owner], strict=True)
    return any(max(positions(q), default=-1) >= min(positions(kv), default=1000) for q, kv in pairs)


def offered(
    order: RingOrder, rank: int, policy: Strided, request: int, window: int | None, seat: int | None = None
) -> list[list[int]]:
    """By the definition: the keys of a request that `rank` has or is sent, each alone or with those it stands for.

    Or that its queries find at `seat`: all keys there, and of others what serves all who see some.
    """
    found = [[key] for key in positions(order.kv[rank][request])]
    for owner in set(range(order.ranks)) - {rank}:
        askers = [rank] if seat is None else [each for each in range(order.ranks) if each != owner]
        asked = [own for each in askers for own in positions(order.q[each][request])]
        near = [each for each in askers if seat is None or sees(order, each, owner)]
        shared = [degree for group, degree in policy.levels if any(each // group == owner // group for each in near)]
        if owner == seat:
            found += [[key] for key in positions(order.kv[owner][request])]
            continue
        for run in order.kv[owner][request]:
            keys = [key for key in run.positions if any(visible(key, own, window) for own in asked)]
            whole = [k for k in keys if k < policy.sinks or any(own - policy.recent < k <= own for own in asked)]
            others = [key for key in keys if key not in whole]
            found += [[key] for key in whole]
            for degree in shared[:1]:
                parts = [others[start : start + degree] for start in range(0, len(others), degree)]
                found += [
                    each for part in parts for each in ([part] if len(part) == degree else [[key] for key in part])
                ]
    return found


def visible(key: int, own: int, window: int | None) -> bool:
    return key <= own and (window is None or key > own - window)


def check_heads(
    found: CSAResult,
    rows: slice,
    core: CSAAttention,
    qkv: list[Tensor],
    asked: list[int],
    keys: list[list[list[int]]],
    tolerance: float = 1e-11,
) -> None:
    """These rows are attention to `keys[head]`: of each group of r the one whose turn it is, with log r added."""
    q, k, v = qkv
    for head, of in enumerate(core.kv_head_of):
        index = [group[of % len(group)] for group in keys[head]]
        weight = torch.tensor([len(group) for group in keys[head]], dtype=torch.float64).log()
        seen = torch.tensor([[visible(group[-1], own, core.window) for group in keys[head]] for own in asked])
        scores = (q[:, head] @ k[index, of].T * core.softmax_scale + weight).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(found.lse[rows, head], scores.logsumexp(1), rtol=tolerance, atol=tolerance)
        out = scores.softmax(1) @ v[index, of]
        torch.testing.assert_close(found.out[rows, head], out, rtol=tolerance, atol=tolerance)


def defined(mesh: comm.DeviceMesh, cases: list[Case], policy: Strided, exchange: str) -> None:
    groups = comm.groups(mesh)
    for case in cases:
        core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case)
        seats = [r for r, part in enumerate(core.parts) for _ in range(*part.q)]
        batch, new, cached = local(case, core, full)
        order, rank, row = core.order(batch, cached), groups.sp.rank(), 0
        with torch.no_grad():
            found = core.attend(*new, batch, cached)
        for request, (_, k, v) in enumerate(full):
            asked = positions(order.q[rank][request])
            rows, row = slice(row, row + len(asked)), row + len(asked)
            if asked:
                where = [None] * core.num_heads if exchange == "ring" else seats
                each = {seat: offered(order, rank, policy, request, case.window, seat) for seat in set(where)}
                keys = [each[seat] for seat in where]
                check_heads(found, rows, core, [new[0][rows], k, v], asked, keys)
        assert row == len(found.out)


SAMPLED = [(4, ((2, 2), (4, 5))), (2, ((2, 7),)), (3, ((1, 1), (3, 4))), (4, ((2, 3),))]


@pytest.mark.parametrize("case", thinned(SAMPLED, lambda case: case == SAMPLED[0]), ids=str)
def test_what_is_sampled_is_what_the_definition_says(case: tuple[int, tuple[tuple[int, int], ...]]) -> None:
    run_mesh((1, case[0]), defined, CASES[:7], Strided(case[1], sinks=2, recent=3), "ring")


@pytest.mark.parametrize("case", thinned(SAMPLED, lambda case: case == SAMPLED[2]), ids=str)
def test_what_is_sampled_for_the_rank_of_a_head_is_what_the_definition_says(
    case: tuple[int, tuple[tuple[int, int], ...]],
) -> None:
    cases = [each for each in CASES[:7] if by_heads(each, case[0])][:: 2 if case == SAMPLED[2] else 1]
    run_mesh((1, case[0]), defined, cases, Strided(case[1], sinks=2, recent=3), "ulysses")


def restated(
    q: Tensor, k: Tensor, v: Tensor, ranks: int, levels: tuple[tuple[int, int], ...], heads: list[int]
) -> tuple[Tensor, Tensor]:
    """One request in one process, as the authors' code has it: `heads` are the KV heads that query heads read."""
    outs, masses = [], []
    for group, degree in levels:
        out, mass = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=q.dtype)
        for first in range(0, ranks, group):
            slices = even_ranges(len(q), ranks)[first : first + group]
            for head, of in enumerate(heads):
                taken = [
                    s.start + t for s in slices for t in range(s.size // degree * degree) if t % degree == of % degree
                ]
                scores = (q[taken, head] @ k[taken, of].T * DIM**-0.5).exp().tril()
                out[taken, head], mass[taken, head] = scores @ v[taken, of] / scores.sum(1, True), scores.sum(1)
        outs.append(out)
        masses.append(mass.half().to(mass.dtype) if group > 1 else mass)
    total = torch.stack(masses).sum(0)
    shares = [(mass / total).masked_fill(total == 0, 0)[..., None] for mass in masses]
    return sum(out * share for out, share in zip(outs, shares, strict=True)), total.log()


def faithful(mesh: comm.DeviceMesh, cases: list[Case], levels: tuple[tuple[int, int], ...]) -> None:
    groups = comm.groups(mesh)
    for case in cases:
        core, (full, _) = layer(case, groups, Strided(levels, faithful=True)), inputs(case)
        batch, new, _ = local(case, core, full)
        wanted = [restated(*qkv, groups.sp.size(), levels, list(core.kv_head_of)) for qkv in full]
        out, lse = (torch.cat(each)[core.rows(batch)] for each in zip(*wanted, strict=True))
        with torch.no_grad():
            found = core.attend(*new, batch)
        torch.testing.assert_close(found.out, out, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.lse, lse, rtol=1e-11, atol=1e-12)


FAITHFUL = [Case("contiguous", q_lens=LONG, heads=heads) for heads in ("mha", "gqa")]


@pytest.mark.parametrize(
    ("ranks", "levels"),
    [(1, ((1, 2),)), (2, ((1, 1), (2, 4))), (4, ((1, 1), (2, 2), (4, 3))), (3, ((3, 2),))],
    ids=str,
)
def test_the_faithful_form_is_the_authors(ranks: int, levels: tuple[tuple[int, int], ...]) -> None:
    run_mesh((1, ranks), faithful, FAITHFUL, levels)


def overflowing(mesh: comm.DeviceMesh) -> tuple[bool, bool]:
    """Whether the output is finite where scores are some 20 at the sampled keys: faithful, and repaired."""
    groups, levels = comm.groups(mesh), ((1, 1), (2, 2))
    case = Case("contiguous", q_lens=(16,), heads="mha")
    found = []
    for policy in (Strided(levels, faithful=True), Strided(levels)):
        core = layer(case, groups, policy, softmax_scale=5.0)
        batch, ones = RaggedBatch.prefill([16]), torch.ones(8, 4, DIM)
        found.append(bool(core(ones, ones, ones, batch).isfinite().all()))
    return found[0], found[1]


def test_denominators_in_half_precision_overflow_in_the_faithful_form_alone() -> None:
    assert run_mesh((1, 2), overflowing) == [(False, True)] * 2


def sharded(mesh: comm.DeviceMesh, policy: Policy, exactly: bool, exchange: str = "ring") -> None:
    """Heads of a tensor-parallel shard are sampled as they are in the whole: with its own result, heads in order."""
    groups, whole = comm.groups(mesh), HeadMap(6, 3, 2, 2)
    rank = groups.tp.rank()
    batch = RaggedBatch.prefill([70])
    torch.manual_seed(4)
    q, k, v = (torch.randn(70, heads, DIM, dtype=torch.float64) for heads in (6, 3, 3))
    alone = CSAAttention(HeadMap(6, 3), DIM, group=groups.sp, policy=policy)
    core = CSAAttention(whole, DIM, group=groups.sp, tp_rank=rank, policy=policy, exchange=exchange)
    rows, own, kv = core.rows(batch), slice(*whole.q_shard(rank)), slice(*whole.kv_shard(rank))
    wanted = attend(q, k, v, None)[rows] if exactly else alone(q[rows], k[rows], v[rows], batch)
    out = core(q[rows, own], k[rows, kv], v[rows, kv], batch)
    torch.testing.assert_close(out, wanted[:, own], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("faithfully", [False, True])
def test_composes_with_tensor_parallel_heads(faithfully: bool) -> None:
    run_mesh((2, 2), sharded, Strided(((1, 1), (2, 3)), faithful=faithfully, sinks=1, recent=2), False)


def test_the_ranks_of_heads_compose_with_tensor_parallel_heads() -> None:
    run_mesh((2, 2), sharded, Strided(((2, 1),)), True, "ulysses")


def served(mesh: comm.DeviceMesh, policy: Policy, exchange: str = "ring") -> None:
    """A prompt in slices, its keys dealt out to a striped cache, and steps of few tokens over that."""
    groups, heads = comm.groups(mesh), HeadMap(6, 2)
    rank, striping = groups.sp.rank(), Striping(groups.sp.size(), 2)
    options: Any = {"group": groups.sp, "policy": policy, "exchange": exchange}
    prompt = CSAAttention(heads, DIM, **options)
    decode = CSAAttention(heads, DIM, placement="striped", interleave=2, **options)
    kv = StripedKV(1, 20, striping.period * 2, 2, DIM, striping=striping, rank=rank, dtype=torch.float64)
    torch.manual_seed(5)
    full = [torch.randn(53, h, DIM, dtype=torch.float64) for h in (6, 2, 2)]
    wanted = attend(*full, None)
    batch = kv.batch(["a"], [47])
    rows = prompt.rows(batch)
    q, k, v = (x[:47][rows] for x in full)
    torch.testing.assert_close(prompt(q, k, v, batch), wanted[:47][rows], rtol=1e-11, atol=1e-12)
    held = [positions(runs) for (runs,) in prompt.order(batch).q]
    tokens_to_stripes(k, v, batch, kv, layer_index=0, rows=held, group=groups.sp)
    at = 47
    for new in (1, 3, 2):
        batch = kv.batch(["a"], [new])
        rows = decode.rows(batch)
        q, k, v = (x[at : at + new][rows] for x in full)
        kv.append_own(0, k, v, batch)
        (before,) = kv.context(batch)
        cached = CachedKV.placed(
            *(x[:before] for x in kv.gather(0, ["a"])), [at], striping.ranks, "striped", interleave=2
        )
        out = decode(q, k, v, batch, cached)
        torch.testing.assert_close(out, wanted[at : at + new][rows], rtol=1e-11, atol=1e-12)
        at += new


def test_leaves_striped_keys_behind_and_decodes_over_them() -> None:
    run_mesh((1, 3), served, Strided(((3, 1),)))
    run_mesh((1, 3), served, Strided(((3, 1),)), "ulysses")


def overlapped(mesh: comm.DeviceMesh, policy: Policy) -> tuple[float, float, float]:
    """Virtual seconds in all, of compute and of transfers."""
    groups, clock = comm.groups(mesh), Clock()
    case = Case("contiguous", heads="mha", q_lens=(256,))
    link = comm.SimulatedLink(0.0, 64.0, clock=clock, sleep=clock.sleep)
    core, (full, _) = layer(case, groups, policy), inputs(case)
    batch, new, _ = local(case, core, full)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        Timed(clock, patch)
        with comm.trace(clock=clock) as t, link.on(groups.sp):
            core(*new, batch)
    report = t.report()
    return clock.now_s, report.compute_s, report.comm_s


def test_transfers_hide_under_the_attention_to_own_keys() -> None:
    """64 tokens a rank: 2,048 s of own attention; samples of 3 ranks at most, 3 * 16 * 256 bytes at 64 a second."""
    for now_s, compute_s, comm_s in run_mesh((1, 4), overlapped, Strided(((1, 1), (4, 4)), sinks=0, recent=0)):
        assert compute_s == now_s == 2048 and comm_s <= 192 * 4


def three_phases(mesh: comm.DeviceMesh, policy: Policy) -> tuple[float, float, float, list[str]]:
    """Virtual seconds in all, of compute and of transfers, where a query takes one for a key; what is launched when."""
    groups, clock = comm.groups(mesh), Clock()
    case, launched = Case("contiguous", heads="mha", q_lens=(256,)), []
    link = comm.SimulatedLink(0.0, 64.0, clock=clock, sleep=clock.sleep)
    core, (full, _) = layer(case, groups, policy, exchange="ulysses"), inputs(case)
    batch, new, _ = local(case, core, full)
    inner = seats.sparse_attention

    def timed(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
        clock.advance(float(len(q) * len(k)))
        launched.append("attend")
        return inner(q, k, *args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        Timed(clock, patch)
        patch.setattr(seats, "sparse_attention", timed)
        send = seats.comm.send_recv_steps
        patch.setattr(seats.comm, "send_recv_steps", lambda *a, **o: (launched.append(o["label"]), send(*a, **o))[1])
        with comm.trace(clock=clock) as t, link.on(groups.sp):
            core(*new, batch)
    report = t.report()
    return clock.now_s, report.compute_s, report.comm_s, launched


def test_three_phases_hide_what_travels_to_heads_and_back() -> None:
    """Ways in under the own attention, 2,048 s; outputs of a rank's tokens, 40 s, under the attention for the next."""
    for now_s, compute_s, comm_s, launched in run_mesh((1, 4), three_phases, Strided(((4, 4),), sinks=0, recent=0)):
        assert compute_s == now_s and comm_s > 3 * 40
        assert launched[:3] == ["csa"] * 3  # keys, and queries before them: then everyone's own keys
        home = [at for at, what in enumerate(launched) if what == "csa (home)"]
        assert len(home) == 4 and all("attend" in launched[a:b] for a, b in pairwise(home))


def refusals(mesh: comm.DeviceMesh) -> None:
    groups, heads = comm.groups(mesh), HeadMap(4, 2)
    batch = RaggedBatch.prefill([8])
    q, kv = torch.ones(4, 4, DIM), torch.ones(4, 2, DIM)
    with own_errors(), comm.record() as sent:
        for levels in ((), ((0, 1),), ((1, 0),), ((2, 2), (2, 4)), ((2, 1), (3, 4)), ((4, 1), (2, 4)), ((2,),)):
            with pytest.raises(
                ValueError, match=r"`levels` must be \(group, degree\) of at least 1, each group a larg"
            ):
                Strided(levels)
        with pytest.raises(ValueError, match="`sinks` and `recent` must be at least 0, got -1 and 64"):
            Strided(((1, 1),), sinks=-1)
        for policy, options, message in (
            (Strided(((2, 2),)), {"exchange": "heads"}, '`exchange` must be "ring" or "ulysses", got \'heads\''),
            (Strided(((4, 2),)), {}, "`levels` must have groups that divide the 2 ranks, got one of 4"),
            (Strided(((2, 2),)), {"interleave": 2}, "`interleave` must be at least 1, and 1 unless striped, got 2"),
            (Strided(((2, 2),)), {"window": 0}, "`window` must be at least 1 key or None, got 0"),
            (
                Strided(((2, 2),), faithful=True),
                {"placement": "zigzag"},
                "`placement` must be \"contiguous\" and `window` None where the policy is faithful, got 'zigzag'",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                CSAAttention(heads, DIM, group=groups.sp, policy=policy, **options)
        with pytest.raises(
            ValueError, match=r"at most as many ranks as query heads \(1\) where `faithful`, got one of"
        ):
            CSAAttention(HeadMap(1, 1), DIM, group=groups.sp, policy=Strided(((2, 2),), faithful=True))
        with pytest.raises(
            ValueError, match=r"`heads` must have a query head for each of the 2 ranks where .*, got 1 in"
        ):
            CSAAttention(HeadMap(1, 1), DIM, group=groups.sp, policy=Strided(((2, 2),)), exchange="ulysses")
        core = CSAAttention(heads, DIM, group=groups.sp, policy=Strided(((2, 2),)))
        with pytest.raises(ValueError, match=r"`q`, `k`, `v` must be \[4, 4, 4\], \[4, 2, 4\], \[4, 2, 4\]"):
            core(q[:3], kv, kv, batch)
        with pytest.raises(ValueError, match="must need no gradient, got one that does"):
            core(q.requires_grad_(), kv, kv, batch)
        past = torch.ones(1, 2, DIM)
        cached = CachedKV.placed(past, past, [2], 2, "contiguous")
        core = CSAAttention(heads, DIM, group=groups.sp, policy=Strided(((2, 2),), faithful=True))
        with pytest.raises(ValueError, match="`cached` must be None where the policy is faithful"):
            core(q.detach(), kv, kv, RaggedBatch.build([8], [10]), cached)
    assert sent.total.calls == 0


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    run_mesh((1, 2), refusals)


def broken(mesh: comm.DeviceMesh, policies: list[Policy], exchange: str = "ring") -> None:
    """A program that is dropped in flight leaves nothing behind: the group serves the next call."""
    groups, case = comm.groups(mesh), Case("contiguous", q_lens=LONG)
    for policy in policies:
        core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case)
        batch, new, _ = local(case, core, full)
        with torch.no_grad():
            wanted = core(*new, batch)
            for stop in range(3 if exchange == "ring" else 8):
                program = core.steps(*new, batch)
                item = next(program)
                for _ in range(stop):
                    try:
                        item = program.send(item.wait())
                    except StopIteration:
                        break
                program.close()
            assert torch.equal(core(*new, batch), wanted)


def test_a_closed_program_leaves_nothing_in_flight() -> None:
    levels = ((1, 1), (3, 2))
    run_mesh((1, 3), broken, [Strided(levels, sinks=2, recent=4), Strided(levels, faithful=True)])
    run_mesh((1, 3), broken, [Strided(levels, sinks=2, recent=4), MASSES[0]], "ulysses")


def interleaved(mesh: comm.DeviceMesh, policy: Policy, exchange: str = "ring") -> None:
    """Two batches by turns give what each gives alone, and two runs the same bits."""
    groups, case = comm.groups(mesh), Case("contiguous", q_lens=LONG)
    core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case, torch.float32)
    batch, new, _ = local(case, core, full)
    with torch.no_grad():
        wanted = core(*new, batch)
        for out in comm.interleave([core.steps(*new, batch), core.steps(*new, batch)], ordered=False):
            assert torch.equal(out, wanted) and out.dtype == torch.float32


def test_programs_by_turns() -> None:
    for exchange in ("ring", "ulysses"):
        run_mesh((1, 3), interleaved, Strided(((1, 1), (3, 2)), sinks=2, recent=4), exchange)


def volumes(mesh: comm.DeviceMesh, case: Case, policy: Strided, exchange: str = "ring") -> int:
    """Bytes that this rank sends, which must be what `plan` says and what the result says."""
    groups = comm.groups(mesh)
    core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case)
    batch, new, cached = local(case, core, full)
    with comm.record() as sent, torch.no_grad():
        found = core.attend(*new, batch, cached)
    heads, kv_heads = HEADS[case.heads]
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": DIM, "itemsize": 8, "exchange": exchange}
    planned = plan.strided_volumes(policy, core.order(batch, cached), **options)
    assert found.sent_bytes == sent.total.num_bytes == planned[groups.sp.rank()]
    return found.sent_bytes


def test_bytes_are_those_of_the_plan() -> None:
    for case in CASES:
        run_mesh((1, 3), volumes, case, Strided(((1, 1), (3, 4)), sinks=2, recent=5))
        if by_heads(case, 3):
            run_mesh((1, 3), volumes, case, Strided(((1, 1), (3, 4)), sinks=2, recent=5), "ulysses")
    for case in FAITHFUL:
        run_mesh((1, 4), volumes, case, Strided(((1, 1), (2, 2), (4, 3)), faithful=True))


def test_bytes_are_those_of_the_formulas() -> None:
    """96 tokens on 4 ranks, 24 on each; a token's key and value 2 * 2 * 4 * 8 bytes."""
    case, pair = Case("contiguous", q_lens=(96,)), 2 * 2 * DIM * 8
    levels = ((1, 1), (2, 2), (4, 4))
    sent = run_mesh((1, 4), volumes, case, Strided(levels, sinks=0, recent=0))
    assert sent == [(12 + 6 + 6) * pair, (6 + 6) * pair, 12 * pair, 0]
    sent = run_mesh((1, 4), volumes, case, Strided(levels, sinks=4, recent=5))
    # Recent are four tokens before the next slice; what does not make a whole sample is whole: (24 - 4 - 4) / 2, ...
    near, far = 4 + 4 + 8, 4 + 20 // 4
    assert sent == [(near + 2 * far) * pair, (4 + 5 + 6) * pair, (4 + 10) * pair, 0]
    # A head each: 12 samples of q, k, v of the three others, and 36 outputs with denominators; half of Ulysses in all.
    case = Case("contiguous", q_lens=(96,), heads="mha")
    sent = run_mesh((1, 4), volumes, case, Strided(((4, 2),), faithful=True))
    assert sent == [12 * 3 * 3 * DIM * 8 + 36 * (DIM * 8 + 2)] * 4
    assert sent[0] - 36 * 2 == 24 * 3 * 4 * DIM * 8 // 2
    # 24 queries of the three others' heads, 72 outputs with masses of the own; half of the keys, to one rank each. The
    # next one is in a group of two with rank 0 and 2 alone.
    sent = run_mesh((1, 4), volumes, case, Strided(((2, 2), (4, 4)), sinks=0, recent=0), "ulysses")
    travels = 72 * DIM * 8 + 72 * (DIM + 1) * 8
    assert sent == [travels + 3 * keys * 2 * DIM * 8 for keys in (12, 6, 12, 0)]


def halves(mesh: comm.DeviceMesh, policies: list[Policy]) -> None:
    """A head that sits where the first rank's keys are is exact, the others find what they find at home."""
    groups, case = comm.groups(mesh), Case("contiguous", q_lens=(61, 30), heads="mha")
    full, _ = inputs(case)
    for policy in policies:
        cores = [layer(case, groups, policy, exchange=exchange) for exchange in ("ring", "ulysses")]
        batch, new, _ = local(case, cores[0], full)
        with torch.no_grad():
            ring, heads = (core.attend(*new, batch) for core in cores)
            wanted = torch.cat(expected(case, full))[cores[0].rows(batch)]
        torch.testing.assert_close(heads.out[:, :2], wanted[:, :2], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(heads.out[:, 2:], ring.out[:, 2:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(heads.lse[:, 2:], ring.lse[:, 2:], rtol=1e-6, atol=1e-6)
        assert groups.sp.rank() == 0 or (ring.out - wanted).norm() > 0.1


def test_both_exchanges_of_two_ranks_choose_alike() -> None:
    run_mesh((1, 2), halves, [*MASSES, Strided(((2, 3),), sinks=1, recent=2)])


MASSES = [
    TopMass(0.85, block=4, sinks=2, recent=3),
    TopMass(0.6, "cover", block=3, rows=7, sinks=0, recent=0),
]


def chosen_by_hand(mesh: comm.DeviceMesh, cases: list[Case], policy: TopMass) -> list[tuple[int, int]]:
    """Each query gathers from what its rank has, is sent or chose, and from stand-ins of the others; chosen, of all."""
    groups, counts = comm.groups(mesh), [(0, 0)]
    for case in cases:
        core, (full, _) = layer(case, groups, policy), inputs(case)
        batch, new, cached = local(case, core, full)
        order, rank, row = core.order(batch, cached), groups.sp.rank(), 0
        with torch.no_grad():
            found = core.attend(*new, batch, cached)
            there, blocks, sketch, means = remote(core, policy, order, rank, full)
            for request, (_, k, v) in enumerate(full):
                asked = positions(order.q[rank][request])
                rows, row = slice(row, row + len(asked)), row + len(asked)
                if asked:
                    runs = [run.size for run in order.q[rank][request]]
                    parts = there[request], blocks[request], sketch[request], runs
                    wanted = wanted_of(core, policy, new[0][rows], k, asked, *parts)
                    counts.append((sum(map(len, wanted)), len(wanted) * sum(map(len, blocks[request]))))
                    k, v = k.clone(), v.clone()
                    for of, chosen in enumerate(wanted):
                        for block, keys, value in zip(blocks[request], sketch[request], means[request], strict=True):
                            if block[0] not in chosen:
                                k[block, of], v[block, of] = keys[:, of], value[of]
                    every = [[key] for key in (*there[request], *chain(*blocks[request]))]
                    # Sketches are decoded in float32, here with others beside them.
                    check_heads(found, rows, core, [new[0][rows], k, v], asked, [every] * core.num_heads, 1e-6)
        assert found.rounds == 3 and row == len(found.out)
    return counts


def remote(
    core: CSAAttention, policy: TopMass, order: RingOrder, rank: int, full: list[list[Tensor]]
) -> tuple[list[list[int]], list[list[list[int]]], list[list[Tensor]], list[list[Tensor]]]:
    """For each request the keys that a rank has in any case; blocks of the others, sketched keys and mean values."""
    there = [positions(runs) for runs in order.kv[rank]]
    blocks: list[list[list[int]]] = [[] for _ in full]
    sketches: list[list[Tensor]] = [[] for _ in full]
    means: list[list[Tensor]] = [[] for _ in full]
    for owner in [(rank - hop) % order.ranks for hop in range(1, order.ranks)]:
        rest: list[tuple[int, list[int]]] = []
        for request, runs in enumerate(order.kv[owner]):
            asked = positions(order.q[rank][request])
            for run in runs:
                keys = [key for key in run.positions if any(visible(key, own, core.window) for own in asked)]
                near = [k for k in keys if k < policy.sinks or any(own - policy.recent < k <= own for own in asked)]
                there[request] += near
                others = [key for key in keys if key not in near]
                rest += [
                    (request, others[start : start + policy.block]) for start in range(0, len(others), policy.block)
                ]
        every = [
            torch.cat([each[i][at] for each, at in zip(full, where, strict=True)]) for i, where in held_by(order, owner)
        ]
        sketch = decode_sketch(*encode_sketch(every[1], every[0], core.kv_head_of), DIM).double()
        firsts = [0, *accumulate(map(len, held_by(order, owner)[1][1]))]
        for request, some in rest:
            at = [firsts[request] + positions(order.kv[owner][request]).index(key) for key in some]
            blocks[request].append(some)
            sketches[request].append(sketch[at])
        for request, (_, _, v) in enumerate(full):
            some = [block for of, block in rest if of == request]
            step = max(1, 64 // len(some[0])) if some else 1
            for group in [some[at : at + step] for at in range(0, len(some), step)]:
                value = encode(v[[*chain(*group)]].mean(0).float(), "int8")
                means[request] += [decode(value, DIM, torch.float32, "int8").double()] * len(group)
    return there, blocks, sketches, means


def held_by(order: RingOrder, owner: int) -> list[tuple[int, list[list[int]]]]:
    """Which queries (0) and keys (1) of each request a rank has; queries counted from the request's first new one."""
    news = [sum(len(positions(rank[request])) for rank in order.q) for request in range(len(order.q[owner]))]
    lens = [sum(len(positions(rank[request])) for rank in order.kv) for request in range(len(order.q[owner]))]
    asked = [
        [p - (every - new) for p in positions(runs)]
        for runs, new, every in zip(order.q[owner], news, lens, strict=True)
    ]
    return [(0, asked), (1, [positions(runs) for runs in order.kv[owner]])]


def wanted_of(
    core: CSAAttention,
    policy: TopMass,
    q: Tensor,
    k: Tensor,
    asked: list[int],
    there: list[int],
    blocks: list[list[int]],
    sketch: list[Tensor],
    runs: list[int],
) -> list[list[int]]:
    """For each KV head the keys of the blocks that the rule takes."""
    found: list[list[int]] = [[] for _ in range(core.num_kv_heads)]
    keys = there + [key for block in blocks for key in block]
    seen = torch.tensor([[visible(key, own, core.window) for key in keys] for own in asked])
    for of, wanted in enumerate(found if blocks else []):
        heads = [head for head, read in enumerate(core.kv_head_of) if read == of]
        estimates = torch.cat([k[there], *sketch])[:, of]
        scores = torch.einsum("shd,nd->hsn", q[:, heads], estimates) * core.softmax_scale
        mass = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        shares = torch.stack([part.sum(1) for part in mass.split([len(there), *map(len, blocks)], 1)], 1)
        take = shares[:, 1:].amax(0) >= 1 - policy.coverage
        if policy.rule == "cover":
            take = torch.zeros(len(blocks), dtype=torch.bool)
            for part in (part for run in shares.split(runs) for part in run.split(policy.rows)):
                base, *some = part.mean(0).tolist()
                for index in sorted(range(len(some)), key=lambda i: -some[i]):
                    take[index] |= base < policy.coverage and some[index] > 0
                    base += some[index]
        wanted += [key for block, some in zip(blocks, take.tolist(), strict=True) if some for key in block]
    return found


@pytest.mark.parametrize("ranks", thinned([3, 2, 4], lambda ranks: ranks == 3))
def test_what_is_chosen_is_what_the_definition_says(ranks: int) -> None:
    for policy, cases in zip(MASSES, (CASES[:7], CASES[2:7:2]), strict=True):
        counts = [count for found in run_mesh((1, ranks), chosen_by_hand, cases, policy) for count in found]
        share = sum(some for some, _ in counts) / sum(every for _, every in counts)
        assert 0.1 < share < 0.9, share


def mass_volumes(mesh: comm.DeviceMesh, case: Case, coverage: float, exchange: str = "ring") -> tuple[int, int]:
    """What this rank sends: counted, said by the result, and its openings and bits alone by the plan of positions."""
    groups, policy = comm.groups(mesh), TopMass(coverage, block=4, sinks=2, recent=3)
    core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case)
    batch, new, cached = local(case, core, full)
    with comm.record() as sent, torch.no_grad():
        found = core.attend(*new, batch, cached)
    assert found.sent_bytes == sent.total.num_bytes
    return found.sent_bytes, sent.by_label().get("csa (blocks)", comm.Count()).num_bytes


def test_only_chosen_blocks_travel() -> None:
    """32 tokens on 4 ranks, 8 each: one KV head of 4 numbers, 64 bytes a token; its sketch a byte a token."""
    case, token = Case("contiguous", q_lens=(32,), heads="fewer than ranks"), 2 * DIM * 8
    dense = [sent for sent, _ in run_mesh((1, 4), mass_volumes, case, 1.0)]
    assert dense == [24 * token, 16 * token, 8 * token, 0]
    some, tiny = (run_mesh((1, 4), mass_volumes, case, coverage) for coverage in (0.9, 1e-9))
    assert [blocks for _, blocks in tiny] == [0] * 4
    # To the next rank two near keys are whole, of rank 0 two sinks as well; the rest are blocks of four.
    opening = [
        (4 + 2 + 2) * token + sketch(4) + 2 * sketch(6),
        2 * token + sketch(6) + sketch(8),
        2 * token + sketch(6),
        0,
    ]
    bits = [0, 1, 2, 3]  # a byte to every rank before
    assert [sent for sent, _ in tiny] == [a + b for a, b in zip(opening, bits, strict=True)]
    for (sent, blocks), (base, _) in zip(some, tiny, strict=True):
        assert sent - blocks == base and blocks % token == 0
    assert 0 < sum(blocks for _, blocks in some) < sum(dense)


def test_each_key_travels_to_the_rank_of_its_head_alone() -> None:
    """As above with four heads, 24 queries and 24 outputs; the last rank's keys are seen by no other."""
    case, token = Case("contiguous", q_lens=(32,), heads="mha"), 2 * DIM * 8
    dense = [sent for sent, _ in run_mesh((1, 4), mass_volumes, case, 1.0, "ulysses")]
    there_and_back = 24 * DIM * 8 + 24 * (DIM + 1) * 8
    assert dense == [there_and_back + 24 * token] * 3 + [there_and_back]
    tiny = [sent for sent, _ in run_mesh((1, 4), mass_volumes, case, 1e-9, "ulysses")]
    # Two near keys are whole, of rank 0 two sinks as well; masses of 24; and bits, a byte for each other rank's keys.
    opening = [(4 * token + sketch(4)) * 3, (2 * token + sketch(6)) * 3, (2 * token + sketch(6)) * 3, 0]
    bits = [2, 2, 2, 3]
    assert tiny == [there_and_back + 24 * 8 + a + b for a, b in zip(opening, bits, strict=True)]


def sketch(*keys: int) -> int:
    """A byte a key; for each rank the mean key, two directions with how many bits each has, and a mean value."""
    assert sketch_bytes(DIM) == (2 * DIM + 2 * (1 + encoded_width(DIM, "int8")), 1)
    return sum(count + sketch_bytes(DIM)[0] + encoded_width(DIM, "int8") for count in keys)


def test_full_coverage_is_exact() -> None:
    for ranks in (1, 3):
        run_mesh((1, ranks), exact, CASES, TopMass(1.0))


def coverages(mesh: comm.DeviceMesh, exchange: str) -> list[float]:
    """The largest error of the output, for more and more coverage."""
    groups, case, errors = comm.groups(mesh), Case("contiguous", q_lens=(256,)), []
    full, _ = inputs(case)
    for coverage in (0.9, 0.95, 0.97, 1.0):
        core = layer(case, groups, TopMass(coverage, block=4, sinks=0, recent=0), exchange=exchange)
        batch, new, _ = local(case, core, full)
        with torch.no_grad():
            wanted = torch.cat(expected(case, full))[core.rows(batch)]
            errors.append(float((core(*new, batch) - wanted).norm()))
    return errors


def test_more_coverage_is_less_error() -> None:
    for ranks, exchange in ((2, "ring"), (3, "ulysses")):
        errors = run_mesh((1, ranks), coverages, exchange)[-1]
        assert errors[-1] < 1e-11 and all(a > 1.05 * b for a, b in pairwise(errors)), errors


def test_masses_compose_and_serve_striped_keys() -> None:
    run_mesh((2, 2), sharded, TopMass(0.6, block=4, sinks=1, recent=2), False)
    run_mesh((1, 3), served, TopMass(1.0))
    run_mesh((1, 3), served, TopMass(1.0), "ulysses")
    run_mesh((1, 3), broken, MASSES)
    run_mesh((1, 3), interleaved, MASSES[0])


def test_ranges_of_top_mass() -> None:
    with own_errors():
        for coverage in (0.0, -0.5, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"`coverage` must lie in \(0, 1\], got"):
                TopMass(coverage)
        with pytest.raises(
            ValueError, match="`block` and `rows` must be at least 1, `sinks` and `recent` at least 0, "
        ):
            TopMass(0.5, block=0)
