"""Between padded and flat: laws of the plan, against the definitions of Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices, sliding_window_causal_mask_function

from seqpar.hf.padding import Padding, check_windows
from tests.hf import versions

CPU = torch.device("cpu")


@st.composite
def masks(draw: st.DrawFn, max_seen: int = 4) -> tuple[torch.Tensor, int]:
    """A 0/1 mask [B, seen + S], and seen."""
    batch, length, seen = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(0, max_seen))
    size = batch * (seen + length)
    bits = draw(st.just([True] * size) | st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(bits).view(batch, seen + length)
    assume(mask[:, seen:].any())
    return mask, seen


def plan(mask: torch.Tensor, seen: int) -> Padding:
    history = None if mask[:, :seen].all() else mask[:, :seen]
    return Padding.plan((mask.shape[0], mask.shape[1] - seen), mask.long(), seen, history)


@settings(deadline=None)
@given(masks())
def test_packing_keeps_the_tokens_in_order(drawn: tuple[torch.Tensor, int]) -> None:
    mask, seen = drawn
    new = mask[:, seen:]
    padding = plan(mask, seen)
    x = torch.arange(1, new.numel() + 1, dtype=torch.float32).view(*new.shape, 1)
    assert torch.equal(padding.pack(x), x[new])
    assert padding.q_lens == tuple(new.sum(1).tolist()) and padding.num_tokens == int(new.sum())
    assert torch.equal(padding.all_rows(CPU).unpack(padding.pack(x)), x * new[..., None])


@settings(deadline=None)
@given(masks(), st.data())
def test_rows_are_those_that_transformers_slices(drawn: tuple[torch.Tensor, int], data: st.DataObject) -> None:
    mask, seen = drawn
    new = mask[:, seen:]
    batch, length = new.shape
    column = st.integers(-length, length - 1)
    one_dim = data.draw(st.lists(column, max_size=4))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, length - 1), min_size=2, max_size=2), min_size=batch, max_size=batch)
    )
    keep: Any = data.draw(
        st.sampled_from([*range(length + 2), torch.tensor(one_dim, dtype=torch.long), torch.tensor(rows), new])
    )
    padding = plan(mask, seen)
    x = torch.arange(1, new.numel() + 1, dtype=torch.float32).view(*new.shape, 1)
    selection = padding.select(keep, CPU)
    flat = padding.pack(x)
    found = selection.unpack(flat if selection.rows is None else flat[list(selection.rows)])
    assert torch.equal(found, versions.kept(x * new[..., None], keep))


@settings(deadline=None)
@given(masks(max_seen=0), st.integers(1, 8))
def test_a_window_that_is_not_refused_sees_what_transformers_sees(drawn: tuple[torch.Tensor, int], window: int) -> None:
    mask, _ = drawn
    try:
        check_windows([None, window], mask)
    except ValueError as error:
        assert "must have no zeros between tokens of a request longer" in str(error)
        kept = [row.nonzero()[:, 0].tolist() for row in mask]
        assert any(row and row[-1] - row[0] + 1 > max(window, len(row)) for row in kept)
        return
    visible = sliding_window_causal_mask_function(window)
    for row in mask:
        kept = row.nonzero()[:, 0].tolist()
        for i, query in enumerate(kept):
            theirs = [key for key in kept if bool(visible(0, 0, torch.tensor(query), torch.tensor(key)))]
            assert theirs == kept[max(0, i + 1 - window) : i + 1]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_packed_sequences_begin_where_transformers_lets_them(positions: list[list[int]]) -> None:
    position_ids = torch.tensor(positions)
    padding = Padding.packed((len(positions), 6), position_ids)
    indices = find_packed_sequence_indices(position_ids)
    rows = [[0] * 6] * len(positions) if indices is None else indices.tolist()
    lengths = [row.count(index) for row in rows for index in sorted(set(row))]
    assert list(padding.q_lens) == lengths


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_compute(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="`input_ids` must hold at least one token for each of at least one request"):
        Padding.plan(shape, None, 0, None)
