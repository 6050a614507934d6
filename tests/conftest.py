"""Set-up of every test process; ranks repeat it (`tests/ranks.py`)."""

import os

# Triton decides at its import whether it interprets or compiles; torch may import it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

from tests import ranks, typed

typed.install("seqpar")

# Machines are shared and the shape checker is slow the first time: an example that takes long is no failure.
hypothesis.settings.register_profile("seqpar", deadline=None)
hypothesis.settings.load_profile("seqpar")

ranks.poison()
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _stop_pools():
    yield
    ranks.stop_pools()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, so that a plain `pytest` passes everywhere."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
