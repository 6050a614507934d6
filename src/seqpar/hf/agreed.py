"""Local work whose failure on one rank is to be an error on all of them, instead of a hang at the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from seqpar import comm
from seqpar.comm import ProcessGroup

__all__ = ["agreed"]


@contextmanager
def agreed(group: ProcessGroup) -> Iterator[None]:
    """Run a block without collectives; when it raised on some rank, raise that rank's error on every one.

    Comm:  one `comm.agree` at the end.

    Raises:
        TypeError, ValueError: the first failing rank's; other exceptions become ValueErrors that name their type.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    message = (
        error if isinstance(error, (ValueError, TypeError)) or error is None else f"{type(error).__name__}: {error}"
    )
    try:
        comm.agree(message, group=group)
    except (ValueError, TypeError) as first:
        if first is error:
            raise
        raise first from error
