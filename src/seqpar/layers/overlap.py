"""Layers that hide their own collectives: they cut their tokens, and the pieces take turns.

One such layer in an otherwise serial model already overlaps, without a schedule around it; within one it nests, since
its steps are a program like any other. What cannot be hidden inside one layer is the first piece's compute and the last
piece's sum; a schedule over whole stacks hides those too.

The attention's pieces are those of the three-phase pipeline, `seqpar.layers.threephase`, followed by the output
projection and its sum over `tp`. A group of one has nothing to wait for, so the order of work differs: with `sp`, a
piece is projected after the next one has been attended with, which hides its way back; without, at once.

Source: the sequence-overlapped MLP is ISO's idea (arXiv:2409.11155) applied to one layer.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import ProcessGroup, Steps, Wire
from seqpar.kv import PagedKV
from seqpar.layers.base import find_layout
from seqpar.layers.decoder import ParallelAttention
from seqpar.layers.linear import QKVParallelLinear, Tokens, enter_steps
from seqpar.layers.mlp import ParallelMLP, given
from seqpar.layers.threephase import AttentionParts, PipelinedUlysses
from seqpar.layers.ulysses import UlyssesAttention
from seqpar.partition import Layout, even_split
from seqpar.ragged import RaggedBatch, Tail

__all__ = ["OverlappedAttention", "OverlappedMLP"]


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
        cls,
        mlp: nn.Module,
        *,
        group: ProcessGroup,
        sp: int = 1,
        sequence_sharded: bool = False,
        wire: Wire | None = None,
        chunks: int = 2,
    ) -> OverlappedMLP:
        """Slice an MLP as `ParallelMLP.from_module` does."""
        new = super().from_module(mlp, group=group, sp=sp, sequence_sharded=sequence_sharded, wire=wire)
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
        self, x: Float[Tensor, "t m"], *, layout: Layout | None = None, num_tokens: Tokens | None = None
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


class OverlappedAttention(ParallelAttention):
    """A `ParallelAttention` that attends with one part of its tokens while another part's collectives travel.

    The sum of the output projection hides under the next part's attention, and with `sp` both all-to-alls do. The
    result is `ParallelAttention`'s up to the rounding of attention and products over fewer rows. Steps below the core's
    `min_tokens`, and steps with a tail or another core, run as they do there.

    Build it by `from_module(..., pipeline=ThreePhase(head_groups=1, query_chunks=2))`, on any layout, without `sp` too.

    Args:
        qkv_proj: sharded over `tp` by heads; activations must not be sequence-sharded.
        core: a `PipelinedUlysses` of one head group, since a token is projected once all its heads are there; its
            query chunks are the parts.
        o_proj: sharded over `tp` by the same heads.

    Raises:
        ValueError: another core, or sequence-sharded activations, whose parts the ranks cannot cut alike.
    """

    core: PipelinedUlysses

    def __init__(self, qkv_proj: QKVParallelLinear, core: UlyssesAttention, o_proj: nn.Module) -> None:
        super().__init__(qkv_proj, core, o_proj)
        if not isinstance(core, PipelinedUlysses) or len(core.parts[None]) > 1:
            raise ValueError(
                f"`core` must be a PipelinedUlysses of one head group, got {type(core).__name__}; pass "
                "`pipeline=ThreePhase(head_groups=1, query_chunks=...)` to `from_module`"
            )
        if self.sequence_sharded:
            raise ValueError("`sequence_sharded` must be False for a layer that cuts its own tokens, got True")

    def steps(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        layout: Layout | None = None,
        num_tokens: int | None = None,
        tail: Tail | None = None,
        core: str | None = None,
    ) -> Steps[Float[Tensor, "t_out m"]]:
        """See `ParallelAttention.forward`; what is launched is waited for one part later.

        Raises:
            ValueError: the core or the output projection is called as a whole (hooks, a wrapper), so that nothing
                would overlap.
        """
        for name in ("core", "o_proj"):
            if not comm.splits(getattr(self, name)):
                raise ValueError(
                    f"`{name}` must be callable in steps, got hooks or a wrapper on it; remove them or use "
                    "ParallelAttention"
                )
        if tail is not None or core is not None or batch.num_tokens < self.core.pipeline.min_tokens:
            run = super().steps(x, batch, cos, sin, kv, layout=layout, num_tokens=num_tokens, tail=tail, core=core)
            return (yield from run)
        group, options = find_layout(self.tp_groups, layout), given(layout=layout)
        x = yield from enter_steps(x, group=group, sequence_sharded=False, num_tokens=None, label=self.label)
        qkv = yield from comm.call(self.qkv_proj, x, **options)
        parts = AttentionParts(self.core, qkv, batch, cos, sin, kv, layout, self.core.pipeline.query_chunks)
        backs: list[Steps[Tensor]] = []
        sums: list[Steps[Tensor]] = []
        late = int(self.core.exchanges[layout].group.size() > 1)
        try:
            yield from parts.ready_steps(0)
            for turn in range(len(parts.pieces) + late):
                if turn < len(parts.pieces):
                    out = yield from parts.attend_steps(0, turn)
                    backs.append(comm.start(parts.back_steps(out, 0, turn)))
                if turn >= late:
                    out = yield from backs[turn - late]
                    sums.append(comm.start(comm.call(self.o_proj, out, **options)))
            done: list[Tensor] = []
            for each in sums:
                done.append((yield from each))
        finally:
            parts.close()
            for started in (*backs, *sums):
                started.close()
        return done[0] if len(done) == 1 else torch.cat(done)
