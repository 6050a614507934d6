"""Attention with a certificate: it holds on every placement, bytes are what is counted, and 0 is exact."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar import comm
from seqpar.kernels import RopeConfig
from seqpar.layers import CachedKV, Certified, CSAAttention
from seqpar.layers.csa.precision import read_raises, write_raises
from seqpar.partition import HeadMap, place_tokens
from seqpar.ragged import RaggedBatch
from tests.layers.reference import attend
from tests.layers.test_ring import DIM, HEADS, Case, expected, inputs, local
from tests.ranks import run_mesh, thinned

LONG = (150, 0, 9, 70)
CASES = [
    Case("contiguous", q_lens=LONG),
    Case("contiguous", q_lens=LONG, window=25),
    Case("zigzag", q_lens=LONG, heads="mha"),
    Case("striped", q_lens=LONG, heads="mqa", interleave=3),
    Case("contiguous", q_lens=(40, 5, 3, 9), past=(140, 3, 0, 21), past_placement="contiguous"),
    Case("zigzag", q_lens=(40, 5, 3, 9), past=(140, 3, 0, 21), window=17, heads="fewer than ranks"),
    Case("striped", q_lens=(1, 1, 0, 2), past=(140, 3, 0, 21), heads="gqa"),
    Case("contiguous", q_lens=(2, 1)),
    Case("contiguous", q_lens=(0, 0)),
]


def layer(case: Case, groups: comm.Groups, policy: Certified, **options: Any) -> CSAAttention:
    heads = HeadMap(*HEADS[case.heads])
    options = {"placement": case.placement, "interleave": case.interleave, "window": case.window} | options
    return CSAAttention(heads, DIM, group=groups.sp, policy=policy, **options)


def longest_seen(case: Case, full: list[list[Tensor]], kv_head_of: tuple[int, ...]) -> Tensor:
    """The norm of the longest value that each query sees."""
    found = []
    for q, _, v in full:
        position = torch.arange(len(v) - len(q), len(v))[:, None]
        seen = torch.arange(len(v)) <= position
        if case.window is not None:
            seen &= torch.arange(len(v)) > position - case.window
        norms = v.norm(dim=-1)[:, list(kv_head_of)].T  # [h, n]
        found.append((seen[:, None] * norms).amax(-1) if len(v) else q.new_zeros(len(q), q.shape[1]))
    return torch.cat(found)


def certified(
    mesh: comm.DeviceMesh, cases: list[Case], policy: Certified, dtype: torch.dtype, exchange: str = "ring"
) -> float:
    groups, worst = comm.groups(mesh), 0.0
    for case in cases:
        core, (full, _) = layer(case, groups, policy, exchange=exchange), inputs(case, dtype)
        batch, new, cached = local(case, core, full)
        with torch.no_grad(), comm.record() as sent:
            found = core.attend(*new, batch, cached)
        exact = [[x.detach().double() for x in request] for request in full]
        rows = core.rows(batch)
        wanted, longest = torch.cat(expected(case, exact))[rows], longest_seen(case, exact, core.kv_head_of)[rows]
        error = (found.out.double() - wanted).norm(dim=-1)
        assert (error <= found.bound).all(), f"{case}: {(error - found.bound).max()}"
        least = 2**-8 if dtype == torch.bfloat16 else 1e-3  # what rounding may make of it
        assert (found.bound <= longest * max(policy.epsilon, least) * (1 + 1e-5)).all(), case
        assert found.out.dtype == dtype and found.rounds <= 3
        assert found.sent_bytes == sent.total.sent_bytes, case
        if len(error):
            worst = max(worst, float((error / longest).max()))
    return worst


FEW = [CASES[i] for i in (0, 4)]
ROPE = RopeConfig(DIM, 100.0)


MIXED = [CASES[i] for i in (2, 5, 6, 8)]


@pytest.mark.parametrize(
    "case",
    thinned([(1, FEW), (3, MIXED), *((n, CASES) for n in (2, 3, 4))], lambda case: case[1] is not CASES),
    ids=["1", "3", "2 all", "3 all", "4 all"],
)
def test_the_error_is_within_the_bound_and_the_bound_within_epsilon(case: tuple[int, list[Case]]) -> None:
    run_mesh((1, case[0]), certified, case[1], Certified(0.02, first=(2, 0)), torch.float32)


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        (Certified(0.02, rope=ROPE), torch.float32),
        (Certified(0.05, first=(-3, -3), targets=()), torch.float32),
        (Certified(1e-9, targets=(1.0,)), torch.float32),
        (Certified(0.03, first=(3, 1)), torch.bfloat16),
        (Certified(0.01), torch.float64),
    ],
    ids=["rope", "shipped", "all shipped", "bf16", "float64"],
)
def test_forms_and_dtypes(policy: Certified, dtype: torch.dtype) -> None:
    """Also where no request may be made, and where no bound can be as small as is asked: owners answer."""
    run_mesh((1, 2), certified, FEW, policy, dtype)


@pytest.mark.parametrize(
    "case",
    thinned([(3, MIXED[::3]), (1, FEW), *((n, CASES) for n in (2, 3, 4))], lambda case: case[1] is not CASES),
    ids=["3", "1", "2 all", "3 all", "4 all"],
)
def test_bounds_of_queries_that_travel_to_their_heads(case: tuple[int, list[Case]]) -> None:
    """Certified where the heads are, and brought home with the outputs."""
    cases = [each for each in case[1] if HEADS[each.heads][0] >= case[0]]
    assert cases
    for policy in (Certified(0.02, first=(2, 0)), Certified(1e-9, targets=(1.0,))):
        run_mesh((1, case[0]), certified, cases, policy, torch.float32, "ulysses")


def decodes(mesh: comm.DeviceMesh, seeds: range) -> list[tuple[int, int]]:
    """Narrow blocks over long prefixes, from diffuse to a needle: bytes by a sketch first, and as usual."""
    groups, sent = comm.groups(mesh), []
    for seed in seeds:
        torch.manual_seed(seed)
        new, old, scale = 1 + seed % 3, int(torch.randint(65, 300, ())), 0.3 * 2 ** (seed % 6)
        q, k, v = (torch.randn(old + new, h, DIM) for h in (4, 2, 2))
        q = q * scale
        v = v * torch.rand(len(v), 1, 1)
        batch = RaggedBatch.build([new], [old + new])
        wanted = attend(q.double(), k.double(), v.double(), None)
        own = [p for run in place_tokens(old, groups.sp.size(), "contiguous")[groups.sp.rank()] for p in run.positions]
        cached = CachedKV.placed(k[own], v[own], [old], groups.sp.size(), "contiguous")
        numbers = []
        for policy in (Certified(0.03), Certified(0.03, narrow=0)):
            core = CSAAttention(HeadMap(4, 2), DIM, group=groups.sp, policy=policy)
            rows = core.rows(batch) + old
            found = core.attend(q[rows], k[rows], v[rows], batch, cached)
            error = (found.out.double() - wanted[rows]).norm(dim=-1)
            longest = v.norm(dim=-1).cummax(0).values.repeat_interleave(2, 1)[rows]
            assert (error <= found.bound).all(), (seed, policy)
            assert (found.bound <= 0.03 * longest * (1 + 1e-5)).all(), (seed, policy)
            numbers.append(found.sent_bytes)
        sent.append((numbers[0], numbers[1]))
    return sent


@pytest.mark.parametrize("seeds", thinned([range(6), range(6, 300)], lambda seeds: len(seeds) == 6), ids=len)
def test_narrow_blocks_drop_tokens_with_a_certificate(seeds: range) -> None:
    found = run_mesh((1, 2), decodes, seeds)
    few, many = (sum(sent[at] for rank in found for sent in rank) for at in (0, 1))
    assert few < 0.97 * many, (few, many)


def without_error(mesh: comm.DeviceMesh, cases: list[Case], dtype: torch.dtype, exchange: str) -> None:
    worst = certified(mesh, cases, Certified(0.0), dtype, exchange)
    assert worst < {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_epsilon_zero_is_exact(dtype: torch.dtype) -> None:
    run_mesh((1, 3), without_error, MIXED if dtype == torch.float64 else FEW, dtype, "ring")
    run_mesh((1, 3), without_error, FEW, dtype, "ulysses")


def with_tensor_parallelism(mesh: comm.DeviceMesh, exchange: str) -> None:
    groups, case = comm.groups(mesh), CASES[0]
    heads = HeadMap(*HEADS["gqa"], tp=2)
    tp_rank = groups.tp.rank()
    core = CSAAttention(heads, DIM, group=groups.sp, policy=Certified(0.02), tp_rank=tp_rank, exchange=exchange)
    full, _ = inputs(case, torch.float32)
    batch = RaggedBatch.prefill(case.q_lens)
    rows, q_heads, kv_heads = core.rows(batch), slice(*heads.q_shard(tp_rank)), slice(*heads.kv_shard(tp_rank))
    q, k, v = (torch.cat([x[i] for x in full]).detach()[rows] for i in range(3))
    found = core.attend(q[:, q_heads], k[:, kv_heads], v[:, kv_heads], batch)
    exact = [[x.detach().double() for x in request] for request in full]
    wanted = torch.cat(expected(case, exact))[rows][:, q_heads]
    assert ((found.out.double() - wanted).norm(dim=-1) <= found.bound).all()


def test_it_holds_the_heads_of_a_tensor_parallel_shard() -> None:
    for exchange in ("ring", "ulysses"):
        run_mesh((2, 2), with_tensor_parallelism, exchange)


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf")])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="`epsilon` must be a finite number from 0 on, got"):
        Certified(epsilon)


def test_other_options_that_are_none_are_refused() -> None:
    for options, message in (
        ({"targets": (1.0, 0.0)}, "`targets` must be up to 3 positive numbers"),
        ({"targets": (1.0,) * 4}, "`targets` must be up to 3 positive numbers"),
        ({"plan_rows": 0}, "`plan_rows` must be at least 1"),
        ({"narrow": -1}, "`narrow` must be at least 0 tokens, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Certified(0.1, **options)


def wrong_rope(mesh: comm.DeviceMesh) -> None:
    with pytest.raises(ValueError, match="`rope` must be of head dimension 4, got 8"):
        layer(CASES[0], comm.groups(mesh), Certified(0.1, rope=RopeConfig(8)))


def test_a_rope_of_other_heads_is_refused() -> None:
    run_mesh((1, 1), wrong_rope)


@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_requests_are_read_as_they_were_written(gains: list[list[int]]) -> None:
    gain = torch.tensor(gains, dtype=torch.int32)
    assert torch.equal(read_raises(write_raises(gain), len(gains), 5), gain)


def activations(tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of every layer of the bundled model on the source of a module of the standard library."""
    transformers = pytest.importorskip("transformers")
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        found.append(tuple(x[0].transpose(0, 1).contiguous() for x in (q, k, v)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("taken", take)
    folder = Path(__file__).parents[2] / "examples" / "tiny-llama"
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="taken")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(inspect.getsource(inspect), return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        model(ids[:, :tokens], use_cache=False)
    return found


def real(mesh: comm.DeviceMesh, layers: list[tuple[Tensor, Tensor, Tensor]], epsilon: float) -> list[float]:
    groups, shares = comm.groups(mesh), []
    policy = Certified(epsilon, rope=RopeConfig(32, 1e6))
    core = CSAAttention(HeadMap(8, 2), 32, group=groups.sp, policy=policy)
    for q, k, v in layers:
        batch = RaggedBatch.prefill((len(q),))
        rows = core.rows(batch)
        found = core.attend(q[rows], k[rows], v[rows], batch)
        with torch.no_grad():
            wanted = attend(q.double(), k.double(), v.double(), None)[rows]
        longest = v.norm(dim=-1).cummax(0)[0].repeat_interleave(4, 1)[rows]
        assert ((found.out - wanted).norm(dim=-1) <= found.bound).all()
        assert (found.bound <= epsilon * longest * (1 + 1e-5)).all()
        shares.append(found.sent_bytes / (len(rows) * 2 * 32 * 2 * 2))
    return shares


@pytest.mark.slow
def test_it_holds_for_the_bundled_model() -> None:
    """600 tokens over two ranks: what the first sends is less than its keys and values in bfloat16."""
    layers = activations(600)
    assert len(layers) == 4
    shares = run_mesh((1, 2), real, [layers[0], layers[3]], 0.03)[0]
    assert max(shares) < 0.8, shares
