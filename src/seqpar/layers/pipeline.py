"""A stage of a pipeline: consecutive layers of a model on some of the ranks, between two messages.

Stages hand activations over as messages in flight. A stage asks for a micro-batch's activations before anything else,
so that who starts its program (`comm.start`) and computes another meanwhile hides their way; what it hands over itself
is on its way when the program ends, and its handle is the program's result. Yielding that handle lost: the schedule
would wait for the next stage before this one could go on with another micro-batch.

Each rank hands its own tokens to the rank with its place in the next stage, as it holds them: a tp-th of them would do,
and a gather over `tp` there, which is a collective in the way of every micro-batch.

A stage has the layouts and chunks of an unstaged model: `shift` and `overlap` look at numbers of tokens alone, so that
all stages choose alike, and what is handed over lies as the micro-batch's layout and chunks say, one message for all.

Source: GPipe (arXiv:1811.06965) for stages and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Groups, Handle, Stages, Steps
from seqpar.kv import PagedKV
from seqpar.layers.decoder import add_layouts
from seqpar.layers.embedding import gather_rows_steps
from seqpar.partition import Interleave, Layout, Range, Shift, even_ranges
from seqpar.ragged import RaggedBatch

__all__ = ["PipelineStage"]


class _Split(NamedTuple):
    """How the tokens of a micro-batch lie on a stage, alike on all of them.

    Attributes:
        layout: it runs under; None for the stored one.
        groups: of that layout.
        cuts: first tokens of the chunks but the first.
        held: tokens of each sequence rank, chunk after chunk.
    """

    layout: Layout | None
    groups: Groups
    cuts: tuple[int, ...]
    held: tuple[tuple[Range, ...], ...]

    @property
    def mine(self) -> tuple[Range, ...]:
        return self.held[self.groups.sp.rank()]

    @property
    def is_usual(self) -> bool:
        """Whether tokens lie in even slices of the stored layout."""
        return self.layout is None and not self.cuts


class PipelineStage(nn.Module):
    """Consecutive decoder layers; the first stage embeds before them, the last has norm and head behind them.

    For inference: nothing is differentiated.

    Args:
        layers: of this stage, in order, over `stages.groups`; in the cache of this stage they count from 0.
        stages: the ranks (`comm.stages`).
        hidden_size: M.
        first_layer: which layer of the model the first one is; children are named by that.
        embed_tokens: takes ids[T/sp]; on the first stage alone.
        norm: over the model dim; on the last stage alone.
        lm_head: takes x[T/sp, M], `rows` and `num_tokens`, as `ParallelLMHead`; on the last stage alone.
        shift: which layout a micro-batch runs under, by its number of tokens; its other layouts must be added
            (`add_layouts`). None for the stored one always.
        overlap: how large micro-batches are cut into chunks that hide each other's collectives; decodes are not. None
            for not at all.

    Raises:
        ValueError: no layers, or parts that belong to another stage.
    """

    unrecorded: ClassVar[str] = "whose messages to other stages have not been tried in one"

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        stages: Stages,
        hidden_size: int,
        first_layer: int = 0,
        embed_tokens: nn.Module | None = None,
        norm: nn.Module | None = None,
        lm_head: nn.Module | None = None,
        shift: Shift | None = None,
        overlap: Interleave | None = None,
    ) -> None:
        super().__init__()
        rank, size = stages.pp.rank(), stages.pp.size()
        self.stages, self.hidden_size, self.shift, self.overlap = stages, hidden_size, shift, overlap
        self.layouts: dict[Layout, Groups] = {stages.groups.layout: stages.groups}
        self.is_first, self.is_last = rank == 0, rank == size - 1
        if not layers:
            raise ValueError(f"`layers` must be at least one, got none for stage {rank} of {size}")
        parts = {"embed_tokens": (embed_tokens, self.is_first, "first")}
        parts |= {name: (part, self.is_last, "last") for name, part in (("norm", norm), ("lm_head", lm_head))}
        for name, (part, wanted, which) in parts.items():
            if (part is not None) != wanted:
                found = "none" if part is None else "one"
                raise ValueError(f"`{name}` must be on the {which} stage alone, got {found} on stage {rank} of {size}")
        self.embed_tokens, self.norm, self.lm_head = embed_tokens, norm, lm_head
        self.layers = nn.ModuleDict({str(first_layer + i): layer for i, layer in enumerate(layers)})

    def add_layouts(self, layouts: Mapping[Layout, Groups]) -> None:
        """Let micro-batches run under other layouts of the stage's ranks (`comm.layout_groups`), on views of weights.

        Raises:
            TypeError: the embedding or a layer is another's, which knows no layouts.
        """
        new = {layout: groups for layout, groups in layouts.items() if layout not in self.layouts}
        first = () if self.embed_tokens is None else (self.embed_tokens,)
        add_layouts((*first, *self.layers.values()), new)
        self.layouts |= new

    def steps(
        self,
        tokens: Int64[Tensor, " t"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        rows: Sequence[int],
    ) -> Steps[Tensor | Handle]:
        """See `forward`; yields first at the receipt of activations, then where the layers do.

        Out:   of the last stage the logits [R, V], or where no row is wanted nothing, [0, M], without running a head;
               of another one the handle of what it hands over, to be waited for.
        """
        self._check(tokens, batch, rows)
        pp, split = self.stages.pp, self._split(batch)
        options: dict[str, Any] = {} if split.layout is None else {"layout": split.layout}
        if self.embed_tokens is not None:
            ids = [tokens[mine.start : mine.stop] for mine in split.mine]
            x = yield from comm.call(self.embed_tokens, torch.cat(ids), **options)
        else:
            like, before = next(self.layers.parameters()), pp.rank() - 1
            x = yield from comm.recv_steps(
                (sum(mine.size for mine in split.mine), self.hidden_size),
                like.dtype,
                src=before,
                group=pp,
                device=like.device,
                label=f"from stage {before}",
            )
        x = yield from self._run_layers(x, batch, cos, sin, kv, split, options)
        if self.norm is None or self.lm_head is None:
            return comm.send_async(x, dst=pp.rank() + 1, group=pp, label=f"to stage {pp.rank() + 1}")
        if not rows:
            return x[:0]
        x = yield from comm.call(self.norm, x)
        if split.is_usual:
            usual: Tensor = yield from comm.call(self.lm_head, x, rows=rows, num_tokens=batch.num_tokens)
            return usual
        x = yield from _find_rows(x, rows, split)
        logits: Tensor = yield from comm.call(self.lm_head, x)
        return logits

    def _split(self, batch: RaggedBatch) -> _Split:
        """The layout and the chunks of a micro-batch, by its numbers of tokens alone."""
        stored, total = self.stages.groups.layout, batch.num_tokens
        chosen = stored if self.shift is None else self.shift.layout_of(total)
        cuts: tuple[int, ...] = ()
        if self.overlap is not None and max(batch.q_lens, default=0) > 1:
            cuts = self.overlap.cuts_of(total)
        slices = [even_ranges(stop - start, chosen.sp) for start, stop in pairwise((0, *cuts, total))]
        held = tuple(
            tuple(chunk[rank].shift(start) for chunk, start in zip(slices, (0, *cuts), strict=True))
            for rank in range(chosen.sp)
        )
        return _Split(None if chosen == stored else chosen, self.layouts[chosen], cuts, held)

    def _run_layers(
        self,
        x: Float[Tensor, "t_local m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None,
        sin: Float[Tensor, "t d"] | None,
        kv: PagedKV | None,
        split: _Split,
        options: Mapping[str, Any],
    ) -> Steps[Float[Tensor, "t_local m"]]:
        """The layers, of all tokens or of chunks that take turns."""

        def run(x: Tensor, batch: RaggedBatch, rows: slice) -> Steps[Tensor]:
            tables = (None if table is None else table[rows] for table in (cos, sin))
            args = (batch, *tables, kv)
            for layer in self.layers.values():
                x = yield from comm.call(layer, x, *args, **options)
            return x

        rows = [slice(start, stop) for start, stop in pairwise((0, *split.cuts, batch.num_tokens))]
        if len(rows) == 1:
            return (yield from run(x, batch, rows[0]))
        parts = zip(x.split([mine.size for mine in split.mine]), batch.split(split.cuts), rows, strict=True)
        return torch.cat((yield from comm.interleave_steps([run(*part) for part in parts])))

    def forward(
        self,
        tokens: Int64[Tensor, " t"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"] | None = None,
        sin: Float[Tensor, "t d"] | None = None,
        kv: PagedKV | None = None,
        *,
        rows: Sequence[int],
    ) -> Float[Tensor, "rows v"] | None:
        """Run one micro-batch through this stage; every stage calls it, in the same order of micro-batches.

        In:    ids of all T tokens, the same on every rank; only the first stage looks at them.
        Out:   logits of some rows, replicated over the last stage; None on the others.
        Comm:  the layers', and x[T/sp, M] from each rank to its place in the next stage.

        Args:
            tokens: ids of the batch's tokens.
            batch: the micro-batch, the same on every rank.
            cos: rotary table of all T tokens.
            sin: the same, sine.
            kv: the cache of this stage's layers and this rank's heads.
            rows: whose logits are wanted, increasing.

        Raises:
            ValueError: weights want gradients; tokens that are not the batch's, rows that it does not have.
        """
        out = comm.run(self.steps(tokens, batch, cos, sin, kv, rows=rows))
        if isinstance(out, Handle):
            out.wait()
            return None
        return out

    def _check(self, tokens: Tensor, batch: RaggedBatch, rows: Sequence[int]) -> None:
        """Refuse on every stage what one of them could not do: the others would wait for it."""
        if torch.is_grad_enabled() and any(param.requires_grad for param in self.parameters()):
            raise ValueError("a stage must run without gradients, got weights that want some; use torch.no_grad()")
        if tokens.shape != (batch.num_tokens,):
            raise ValueError(f"`tokens` must be the batch's {batch.num_tokens} ids, got shape {list(tokens.shape)}")
        bad = [row for row in rows if not 0 <= row < batch.num_tokens]
        if bad:
            raise ValueError(f"`rows` must lie in [0, {batch.num_tokens}), got {bad[:3]}")


def _find_rows(x: Float[Tensor, "t_local m"], rows: Sequence[int], split: _Split) -> Steps[Float[Tensor, "rows m"]]:
    """Some rows of a micro-batch, on every rank, out of what the sequence ranks hold."""
    sizes = [sum(mine.size for mine in held) for held in split.held]
    order = [row for mine in chain(*split.held) for row in range(mine.start, mine.stop)]
    place = {row: at for at, row in enumerate(order)}
    return (
        yield from gather_rows_steps(
            x,
            rows=[place[row] for row in rows],
            num_tokens=len(order),
            sizes=sizes,
            group=split.groups.sp,
            label="rows",
        )
    )
