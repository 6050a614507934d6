"""Sparse attention by policy: exact where nothing is left out, the definitions where something is, bytes, overlap."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import comm, plan
from seqpar.kv import StripedKV
from seqpar.layers import CachedKV, CSAAttention, Policy, Strided, tokens_to_stripes
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


def exact(mesh: comm.DeviceMesh, cases: list[Case], policy: Policy) -> None:
    groups = comm.groups(mesh)
    for case in cases:
        core, (full, _) = layer(case, groups, policy), inputs(case)
        batch, new, cached = local(case, core, full)
        with torch.no_grad():
            found = core.attend(*new, batch, cached)
            wanted = torch.cat(expected(case, full))[core.rows(batch)]
        torch.testing.assert_close(found.out, wanted, rtol=1e-11, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
        assert found.bound is None and found.rounds == (groups.sp.size() > 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_one_level_of_degree_one_is_exact(ranks: int) -> None:
    run_mesh((1, ranks), exact, CASES, Strided(((ranks, 1),), sinks=0, recent=0))


def test_whole_keys_are_exact() -> None:
    """Sinks, or recent keys, that are all keys leave nothing to sample."""
    run_mesh((1, 3), exact, CASES, Strided(((1, 1), (3, 4)), sinks=200, recent=0))
    run_mesh((1, 3), exact, CASES, Strided(((1, 1), (3, 4)), sinks=0, recent=200))


def sampled(order: RingOrder, rank: int, policy: Strided, request: int, query: int, head: int, window: int | None):
    """By the definition: positions of the keys of a request that a query of `rank` gathers from, with their weights."""
    asked = positions(order.q[rank][request])
    visible = lambda key, own: key <= own and (window is None or key > own - window)  # noqa: E731
    found = [(key, 1) for key in positions(order.kv[rank][request]) if visible(key, query)]
    for owner in set(range(order.ranks)) - {rank}:
        shared = [degree for group, degree in policy.levels if rank // group == owner // group]
        for run in order.kv[owner][request]:
            keys = [key for key in run.positions if any(visible(key, own) for own in asked)]
            near = [
                key < policy.sinks or any(own - policy.recent < key <= own for own in asked) or shared[:1] == [1]
                for key in keys
            ]
            found += [(key, 1) for key, whole in zip(keys, near, strict=True) if whole and visible(key, query)]
            others = [key for key, whole in zip(keys, near, strict=True) if not whole] if shared else []
            for start in range(0, len(others), shared[0] if shared else 1):
                some = others[start : start + shared[0]]
                if len(some) < shared[0]:
                    found += [(key, 1) for key in some if visible(key, query)]
                elif visible(some[-1], query):
                    found.append((some[head % shared[0]], shared[0]))
    return found


def defined(mesh: comm.DeviceMesh, cases: list[Case], policy: Strided) -> None:
    groups = comm.groups(mesh)
    for case in cases:
        core, (full, _) = layer(case, groups, policy), inputs(case)
        batch, new, cached = local(case, core, full)
        order, rank = core.order(batch, cached), groups.sp.rank()
        with torch.no_grad():
            found, row = core.attend(*new, batch, cached), 0
        for request, (_, k, v) in enumerate(full):
            for query in positions(order.q[rank][request]):
                for head in range(core.num_heads):
                    of = core.kv_head_of[head]
                    keys = sampled(order, rank, policy, request, query, of, case.window)
                    index = [key for key, _ in keys]
                    weight = torch.tensor([log(w) for _, w in keys], dtype=torch.float64)
                    scores = k[index, of] @ new[0][row, head] * core.softmax_scale + weight
                    torch.testing.assert_close(found.lse[row, head], scores.logsumexp(0), rtol=1e-11, atol=1e-12)
                    torch.testing.assert_close(
                        found.out[row, head], scores.softmax(0) @ v[index, of], rtol=1e-11, atol=1e-12
                    )
                row += 1
        assert row == len(found.out)


SAMPLED = [(2, ((2, 7),)), (4, ((2, 2), (4, 5))), (3, ((1, 1), (3, 4))), (4, ((2, 3),))]


@pytest.mark.parametrize("case", thinned(SAMPLED, lambda case: case in SAMPLED[:2]), ids=str)
def test_what_is_sampled_is_what_the_definition_says(case: tuple[int, tuple[tuple[int, int], ...]]) -> None:
    run_mesh((1, case[0]), defined, CASES[:7], Strided(case[1], sinks=2, recent=3))


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


def sharded(mesh: comm.DeviceMesh, policy: Policy, exactly: bool) -> None:
    """Heads of a tensor-parallel shard are sampled as they are in the whole: with its own result, heads in order."""
    groups, whole = comm.groups(mesh), HeadMap(6, 3, 2, 2)
    rank = groups.tp.rank()
    batch = RaggedBatch.prefill([70])
    torch.manual_seed(4)
    q, k, v = (torch.randn(70, heads, DIM, dtype=torch.float64) for heads in (6, 3, 3))
    alone = CSAAttention(HeadMap(6, 3), DIM, group=groups.sp, policy=policy)
    core = CSAAttention(whole, DIM, group=groups.sp, tp_rank=rank, policy=policy)
    rows, own, kv = core.rows(batch), slice(*whole.q_shard(rank)), slice(*whole.kv_shard(rank))
    wanted = attend(q, k, v, None)[rows] if exactly else alone(q[rows], k[rows], v[rows], batch)
    out = core(q[rows, own], k[rows, kv], v[rows, kv], batch)
    torch.testing.assert_close(out, wanted[:, own], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("faithfully", [False, True])
def test_composes_with_tensor_parallel_heads(faithfully: bool) -> None:
    run_mesh((2, 2), sharded, Strided(((1, 1), (2, 3)), faithful=faithfully, sinks=1, recent=2), False)


def served(mesh: comm.DeviceMesh, policy: Policy) -> None:
    """A prompt in slices, its keys dealt out to a striped cache, and steps of few tokens over that."""
    groups, heads = comm.groups(mesh), HeadMap(6, 2)
    rank, striping = groups.sp.rank(), Striping(groups.sp.size(), 2)
    prompt = CSAAttention(heads, DIM, group=groups.sp, policy=policy)
    decode = CSAAttention(heads, DIM, group=groups.sp, policy=policy, placement="striped", interleave=2)
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


def broken(mesh: comm.DeviceMesh, policies: list[Policy]) -> None:
    """A program that is dropped in flight leaves nothing behind: the group serves the next call."""
    groups, case = comm.groups(mesh), Case("contiguous", q_lens=LONG)
    for policy in policies:
        core, (full, _) = layer(case, groups, policy), inputs(case)
        batch, new, _ = local(case, core, full)
        with torch.no_grad():
            wanted = core(*new, batch)
            for stop in range(3):
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


def interleaved(mesh: comm.DeviceMesh, policy: Policy) -> None:
    """Two batches by turns give what each gives alone, and two runs the same bits."""
    groups, case = comm.groups(mesh), Case("contiguous", q_lens=LONG)
    core, (full, _) = layer(case, groups, policy), inputs(case, torch.float32)
    batch, new, _ = local(case, core, full)
    with torch.no_grad():
        wanted = core(*new, batch)
        for out in comm.interleave([core.steps(*new, batch), core.steps(*new, batch)], ordered=False):
            assert torch.equal(out, wanted) and out.dtype == torch.float32


def test_programs_by_turns() -> None:
    run_mesh((1, 3), interleaved, Strided(((1, 1), (3, 2)), sinks=2, recent=4))


def volumes(mesh: comm.DeviceMesh, case: Case, policy: Strided) -> int:
    """Bytes that this rank sends, which must be what `plan` says and what the result says."""
    groups = comm.groups(mesh)
    core, (full, _) = layer(case, groups, policy), inputs(case)
    batch, new, cached = local(case, core, full)
    with comm.record() as sent, torch.no_grad():
        found = core.attend(*new, batch, cached)
    heads, kv_heads = HEADS[case.heads]
    options = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": DIM, "itemsize": 8}
    planned = plan.strided_volumes(policy, core.order(batch, cached), **options)
    assert found.sent_bytes == sent.total.num_bytes == planned[groups.sp.rank()]
    return found.sent_bytes


def test_bytes_are_those_of_the_plan() -> None:
    for case in CASES:
        run_mesh((1, 3), volumes, case, Strided(((1, 1), (3, 4)), sinks=2, recent=5))
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
