"""A stage of a pipeline: consecutive layers of a model on some of the ranks, between two messages.

Stages hand activations over as messages in flight. A stage asks for a micro-batch's activations before anything else,
so that who starts its program (`comm.start`) and computes another meanwhile hides their way; what it hands over itself
is on its way when the program ends, and its handle is the program's result. Yielding that handle lost: the schedule
would wait for the next stage before this one could go on with another micro-batch.

Each rank hands its own tokens to the rank with its place in the next stage, as it holds them: a tp-th of them would do,
and a gather over `tp` there, which is a collective in the way of every micro-batch.

Source: GPipe (arXiv:1811.06965) for stages and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from seqpar import comm
from seqpar.comm import Handle, Stages, Steps
from seqpar.kv import PagedKV
from seqpar.partition import even_ranges
from seqpar.ragged import RaggedBatch

__all__ = ["PipelineStage"]


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

    Raises:
        ValueError: no layers, or parts that belong to another stage.
    """

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
    ) -> None:
        super().__init__()
        rank, size = stages.pp.rank(), stages.pp.size()
        self.stages, self.hidden_size = stages, hidden_size
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
        pp, sp = self.stages.pp, self.stages.groups.sp
        mine = even_ranges(batch.num_tokens, sp.size())[sp.rank()]
        if self.embed_tokens is not None:
            x = yield from comm.call(self.embed_tokens, tokens[mine.start : mine.stop])
        else:
            like, before = next(self.layers.parameters()), pp.rank() - 1
            x = yield from comm.recv_steps(
                (mine.size, self.hidden_size),
                like.dtype,
                src=before,
                group=pp,
                device=like.device,
                label=f"from stage {before}",
            )
        for layer in self.layers.values():
            x = yield from comm.call(layer, x, batch, cos, sin, kv)
        if self.norm is None or self.lm_head is None:
            return comm.send_async(x, dst=pp.rank() + 1, group=pp, label=f"to stage {pp.rank() + 1}")
        logits: Tensor = x[:0]
        if rows:
            x = yield from comm.call(self.norm, x)
            logits = yield from comm.call(self.lm_head, x, rows=rows, num_tokens=batch.num_tokens)
        return logits

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
