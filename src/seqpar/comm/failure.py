"""What a rank is told when others fail."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from seqpar.comm.mesh import describe

__all__ = ["CommError", "failure"]


class CommError(RuntimeError):
    """A collective failed: another rank died, raised, or did not come within the timeout."""


def failure(op: str, label: str, group: ProcessGroup, error: RuntimeError) -> CommError:
    """The error that names the collective, the layer and the group, and how far this rank has come in it."""
    where = f" of `{label}`" if label else ""
    launched = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return CommError(
        f"`{op}`{where} on rank {group.rank()} of {describe(group)} failed after {launched} launches there; a rank "
        f"died, raised, or was later than the timeout: {error}"
    )
