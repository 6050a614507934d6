"""One rank's error becomes every rank's."""

import pytest

from seqpar import comm
from tests.ranks import run_mesh


def agree_on(mesh, errors, wanted):
    group = comm.groups(mesh).flat
    error = errors[group.rank()]
    if wanted is None:
        comm.agree(error, group=group)
        return
    with pytest.raises(type(wanted)) as info:
        comm.agree(error, group=group)
    assert type(info.value) is type(wanted)
    assert str(info.value) == str(wanted)


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        ((None, None, None), None),
        ((None, "of rank 1 — ünïcode", None), ValueError("of rank 1 — ünïcode")),
        ((None, "of rank 1", TypeError("of rank 2")), ValueError("of rank 1")),
        ((TypeError("of rank 0"), None, "of rank 2"), TypeError("of rank 0")),
        (("", None, None), ValueError("")),
        (("long " * 10_000,) * 3, ValueError("long " * 10_000)),
    ],
    ids=["none", "one", "first-of-two", "type", "empty", "all"],
)
def test_all_ranks_raise_the_first_error(errors, wanted):
    run_mesh((3, 1), agree_on, errors, wanted)


def test_alone():
    run_mesh((1, 1), agree_on, ["bad"], ValueError("bad"))
    run_mesh((1, 1), agree_on, [TypeError("bad")], TypeError("bad"))
    run_mesh((1, 1), agree_on, [None], None)
