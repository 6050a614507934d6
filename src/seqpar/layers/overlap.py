"""Layers that hide their own collectives: they cut their tokens, and the pieces take turns.

One such layer in an otherwise serial model already overlaps, without a schedule around it; within one it nests, since
its steps are a program like any other. What cannot be hidden inside one layer is the first piece's compute and the last
piece's sum; a schedule over whole stacks hides those too.

Source: the sequence-overlapped MLP is ISO's idea (arXiv:2409.11155) applied to one layer.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps
from seqpar.layers.mlp import ParallelMLP
from seqpar.partition import Layout, even_split

__all__ = ["OverlappedMLP"]


class OverlappedMLP(ParallelMLP):
    """A `ParallelMLP` that computes one part of its tokens while another part's sum travels.

    The result is `ParallelMLP`'s for the same parts, and for the whole where products of fewer rows round alike.

    Args:
        hidden_size: M.
        intermediate_size: F; it need not divide.
        group: the tensor-parallel ranks.
        chunks: parts of equal numbers of tokens.
        options: see `ParallelMLP`; activations must not be sequence-sharded.

    Raises:
        ValueError: fewer than two chunks, or sequence-sharded activations, whose parts the ranks cannot cut alike.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, group: ProcessGroup, chunks: int = 2, **options: Any
    ) -> None:
        super().__init__(hidden_size, intermediate_size, group=group, **options)
        self._set_chunks(chunks)

    @classmethod
    def from_module(
        cls, mlp: nn.Module, *, group: ProcessGroup, sp: int = 1, sequence_sharded: bool = False, chunks: int = 2
    ) -> OverlappedMLP:
        """Slice an MLP as `ParallelMLP.from_module` does."""
        new = super().from_module(mlp, group=group, sp=sp, sequence_sharded=sequence_sharded)
        assert isinstance(new, OverlappedMLP)
        new._set_chunks(chunks)
        return new

    def _set_chunks(self, chunks: int) -> None:
        if chunks < 2:
            raise ValueError(f"`chunks` must be at least 2, got {chunks}; ParallelMLP does not cut")
        if self.sequence_sharded:
            raise ValueError("`sequence_sharded` must be False for a layer that cuts its own tokens, got True")
        self.chunks = chunks

    def steps(
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: int | None = None
    ) -> Steps[Float[Tensor, "t m"]]:
        """See `ParallelMLP.forward`; the parts' sums are launched one after another and waited for in turn.

        Raises:
            ValueError: the row-parallel layer is called as a whole (hooks, a wrapper), so that nothing would overlap.
        """
        if not comm.splits(self.down_proj):
            raise ValueError(
                "`down_proj` must be callable in steps, got hooks or a wrapper on it; remove them or use ParallelMLP"
            )
        parts = x.split(even_split(len(x), min(self.chunks, max(1, len(x)))))
        run = super().steps
        done = yield from comm.interleave_steps([run(part, layout=layout, num_tokens=num_tokens) for part in parts])
        return torch.cat(done)
