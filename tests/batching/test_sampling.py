"""Sampling beside Transformers' own filters, and that no other row matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from seqpar.batching import Request, Sampling, sample, uniform
from tests.kernels.own_errors import own_errors

CASES = [(0.7, None, 1.0), (1.0, 5, 1.0), (1.3, None, 0.6), (2.0, 7, 0.8), (0.5, 100, 0.3), (1.0, 1, 1.0)]


def drawn(logits: torch.Tensor, count: int, **how: object) -> torch.Tensor:
    """How often each token comes, over so many numbers."""
    rows = logits.expand(count, -1)
    tokens = sample(rows, [Sampling(seed=3, **how)] * count, range(count))  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_tokens_are_drawn_as_transformers_filters_them(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    kept = TemperatureLogitsWarper(temperature)(None, logits.double())
    kept = TopKLogitsWarper(top_k)(None, kept) if top_k else kept
    expected = TopPLogitsWarper(top_p)(None, kept).softmax(-1)[0]
    count = 4000
    found = drawn(logits, count, temperature=temperature, top_k=top_k, top_p=top_p)
    assert not found[expected == 0].any()
    # Five standard deviations of a binomial, and one for the token that comes less than once.
    assert ((found - count * expected).abs() <= 5 * (count * expected).sqrt() + 1).all()


def test_the_fewest_tokens_that_reach_a_share() -> None:
    """Of four equally likely ones two are a half, and a hair more takes a third."""
    logits = torch.zeros(1, 4)
    assert (drawn(logits, 300, temperature=1.0, top_p=0.5) > 0).tolist() == [True, True, False, False]
    assert (drawn(logits, 300, temperature=1.0, top_p=0.51) > 0).tolist() == [True, True, True, False]


def test_no_other_row_matters() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    how = [Sampling(temperature=t, top_k=k, seed=s) for s, (t, k) in enumerate([(0.0, None), (1.0, 9)] * 3)]
    numbers = [4, 0, 2, 7, 1, 1]
    together = sample(logits, how, numbers)
    assert together == [sample(logits[i : i + 1], [how[i]], [numbers[i]])[0] for i in range(6)]
    order = [3, 1, 5, 0]
    assert sample(logits[order], [how[i] for i in order], [numbers[i] for i in order]) == [together[i] for i in order]
    assert together[0] == int(logits[0].argmax())


def test_parameters_at_their_bounds() -> None:
    """What passes the checks never fails in a step, where it would take others with it."""
    logits = torch.tensor([[1.0, 3.0, -torch.inf, 2.9]])
    for temperature in (5e-324, 1e-300, 1e308):
        for top_k, top_p in ((None, 1.0), (10**400, 5e-324), (1, 1.0)):
            how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=(1 << 64) - 1)
            (token,) = sample(logits, [how], [10**6])
            assert token in ((1,) if temperature < 1 or top_k is not None else (0, 1, 3))


def test_uniform_numbers_are_spread_and_do_not_repeat() -> None:
    values = torch.tensor([uniform(seed, number) for seed in range(60) for number in range(60)], dtype=torch.float64)
    assert values.unique().numel() == 3600 and values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 10, 0.0, 1.0)
    assert ((counts - 360).abs() < 5 * 360**0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "`temperature` must be finite and >= 0, got -1.0; 0 is greedy"),
        ({"temperature": float("nan")}, "`temperature` must be finite"),
        ({"temperature": 10**400}, "`temperature` must be finite"),
        ({"top_p": float("nan")}, "`top_p` must be in"),
        ({"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "`top_p` must be in"),
        ({"seed": -1}, r"`seed` must be in \[0, 2\*\*64\), got -1"),
    ],
)
def test_parameters_out_of_range(options: dict[str, object], message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "`prompt` must have at least one token, got none for request 'a'"),
        ({"prompt": [1, -2]}, "`prompt` must hold token ids >= 0, got -2"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0 for request 'a'"),
        ({"stop_strings": ["x", ""]}, "`stop_strings` must not be empty texts"),
        ({"id": float("nan")}, "`id` must equal itself, got nan"),
    ],
)
def test_requests_that_are_none(options: dict[str, object], message: str) -> None:
    with own_errors(), pytest.raises(ValueError, match=message):
        Request(**{"id": "a", "prompt": [1], "max_new_tokens": 1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(seed=1.5), "`top_k` and `seed` must be integers, got None and 1.5"),  # type: ignore[arg-type]
        (lambda: Sampling(top_k=2.5), "got 2.5 and 0"),  # type: ignore[arg-type]
        (lambda: Sampling(temperature="1"), "`temperature` and `top_p` must be numbers, got '1'"),  # type: ignore[arg-type]
        (lambda: Sampling(top_p=None), "must be numbers, got 0.0 and None"),  # type: ignore[arg-type]
        (lambda: Request(["a"], [1], 1), "`id` must be hashable, got list"),  # type: ignore[arg-type]
        (lambda: Request((["a"],), [1], 1), "`id` must be hashable, got tuple"),
        (lambda: Request("a", 5, 1), "`prompt` must be a list, got int for request 'a'"),  # type: ignore[arg-type]
        (lambda: Request("a", [1], 1, stop_strings="ab"), "`stop_strings` must be a list, got str"),
        (lambda: Request("a", [1], 1, stop_tokens=7), "`stop_tokens` must be a list, got int"),  # type: ignore[arg-type]
        (lambda: Request("a", [1], 1, stop_tokens=["b"]), "`stop_tokens` must be integers"),  # type: ignore[list-item]
        (lambda: Request("a", [1, 2.0], 1), "`prompt` and `max_new_tokens` must be integers"),  # type: ignore[list-item]
        (lambda: Request("a", [1], 2.5), "must be integers, got others for request 'a'"),  # type: ignore[arg-type]
        (lambda: Request("a", [1], 2, stop_strings=[3]), "`stop_strings` must be texts"),  # type: ignore[list-item]
    ],
)
def test_types_that_would_fail_in_a_step(make: Callable[[], object], message: str) -> None:
    with own_errors(), pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (2, 5), (1, 5)], ids=str)
def test_logits_that_are_not_of_the_requests(shape: tuple[int, int]) -> None:
    numbers = [0] * (1 if shape != (1, 5) else 2)
    with (
        own_errors(),
        pytest.raises(ValueError, match="`logits` must have a row of at least one for each request, got"),
    ):
        sample(torch.zeros(shape), [Sampling()], numbers)
