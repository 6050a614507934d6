"""The cases of the CUDA tests on a CPU: what they run is right in itself, and every wait happens."""

from __future__ import annotations

from tests import cuda_cases
from tests.ranks import run_ranks


def everything(rank: int, p: int) -> list[str]:
    return cuda_cases.check_all("cpu")


def test_the_cases_of_the_cuda_tests_run_on_a_cpu() -> None:
    (ran,) = run_ranks(1, everything)
    assert len(ran) == len(cuda_cases.CASES) + len(cuda_cases.STARTS)


def graphs(rank: int, p: int) -> tuple[int, int, int]:
    return cuda_cases.check_graphs("cpu")


def test_recorded_steps_equal_eager_ones_bit_for_bit() -> None:
    """On a CPU every replay calls the step."""
    assert run_ranks(1, graphs) == [(5, 1, 2 + 5 + 1)]


def decodes(rank: int, p: int) -> tuple[int, int]:
    return cuda_cases.check_decodes("cpu")


def test_recorded_decodes_give_the_tokens_of_eager_ones() -> None:
    assert run_ranks(1, decodes) == [(11, 12)]
