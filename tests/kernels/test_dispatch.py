"""What `backend="auto"` means on a GPU: never the definition without a word."""

from __future__ import annotations

import pytest
import torch

from seqpar.kernels import choose_backend, dispatch, tile_gradients
from seqpar.kernels.dispatch import auto_backend

GPU = torch.device("cuda")
ENTRIES = {*dispatch.TRITON_OPS, "tile"}


@pytest.mark.parametrize("installed", [True, False])
def test_auto_is_no_definition_on_a_gpu(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton its kernels, and without it PyTorch's operators."""
    monkeypatch.setattr(dispatch, "_has_triton", lambda: installed)
    for op in ENTRIES:
        for dtype in dispatch.TRITON_DTYPES:
            expected = "triton" if installed and op != "tile" else "torch"
            assert choose_backend(op, GPU, dtype) == auto_backend(op, GPU, dtype) == expected


def test_where_there_is_nothing_else_it_says_so() -> None:
    for op in sorted(ENTRIES):
        if choose_backend(op, GPU, torch.float64) != "reference":
            assert auto_backend(op, GPU, torch.float64) == "torch"
            continue
        with pytest.warns(UserWarning, match=f'`backend="auto"` of `{op}` is "reference" for torch.float64 on cuda'):
            assert auto_backend(op, GPU, torch.float64) == "reference"
    x, mass = torch.zeros(2, 1, 4, device="meta"), torch.zeros(2, 1, device="meta")
    with pytest.warns(UserWarning, match='of `tile_gradients` is "reference" for torch.float32 on meta'):
        tile_gradients(x, x, x, x, x, mass, softmax_scale=1.0, kv_head_of=(0,))
