"""A parallelized model as a function of a ragged batch: what `seqpar.batching` runs, without `generate`'s padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar import comm
from seqpar.hf.backbone import LMHead, ParallelBackbone
from seqpar.hf.recording import RecordedDecodes, Recording
from seqpar.partition import Layout, Shift
from seqpar.ragged import RaggedBatch

__all__ = ["Stepper", "check_rotations"]

_VARYING = ("dynamic", "longrope")  # rotary tables of a token that depend on the longest request of its batch


def check_rotations(rotary_emb: nn.Module) -> None:
    """Refuse rotary tables under which a token depends on who else is in the batch.

    Raises:
        ValueError: they do.
    """
    kind = getattr(rotary_emb, "rope_type", "default")
    if kind in _VARYING:
        raise ValueError(f"`rope_type` must give a token the same rotation in any batch, got {kind!r}; use `generate`")


class Stepper:
    """One step of a parallelized model over a cache of its own: tokens of many requests in, logits of some rows out.

    The options that the model was loaded with hold: layouts by the number of tokens (`shift`), chunks of a large step
    that take turns (`overlap`), also across requests. Modules must not be given hooks after this was made.

    Args:
        model: from `load` or `parallelize`; keep it.
        num_pages: of the cache, for all requests.
        page_size: tokens in a page.
        stored: what keys and values are stored in; None for the model's dtype, or torch.float8_e4m3fn (`PagedKV`).
        recording: which decodes run as recorded graphs; None for none. Takes one more page.

    Attributes:
        kv: the cache of this rank's heads.
        recorded: what was recorded; None where nothing was.
        vocab_size: ids that the model knows.
        calls: steps so far.

    Comm:  a byte of each rank when it is made, and with `recording` the steps that are recorded.

    Raises:
        TypeError: the model is not parallelized.
        ValueError: its rotary positions depend on the longest request, which would make tokens depend on the batch; its
            prefill or decode wants another cache than one by heads; what `RecordedDecodes` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_pages: int,
        page_size: int,
        stored: torch.dtype | None = None,
        recording: Recording | None = None,
    ) -> None:
        backbone, head = getattr(model, "model", None), getattr(model, "lm_head", None)
        if not isinstance(backbone, ParallelBackbone) or not isinstance(head, LMHead):
            raise TypeError(
                f"`model` must be parallelized, got {type(model).__name__}; use seqpar.hf.load or parallelize"
            )
        check_rotations(backbone.rotary_emb)
        attend = backbone.attend
        if attend.stripes:
            raise ValueError(
                '`model` must have prefill="ulysses" and decode="local", whose steps share one cache, got '
                f"prefill={attend.prefill!r} and decode={attend.decode!r}; use `generate`"
            )
        room = (num_pages, page_size, None) if recording is None else (num_pages + 1, page_size, num_pages)
        self.kv = backbone.cache_spec().make(*room, stored=stored)
        self.vocab_size, self.calls = backbone.vocab_size, 0
        self._backbone, self._head = backbone, head
        self._has_tail = backbone.takes_tail()
        self.recorded = None if recording is None else self._record(recording)

    @torch.no_grad()
    def _record(self, recording: Recording) -> RecordedDecodes:
        backbone = self._backbone
        layouts = [layout for layout in backbone.layouts if layout is not None]
        rule = backbone.shift if isinstance(backbone.shift, Shift) else layouts if backbone.shift else [self._stored]
        modules, group = (backbone, self._head), backbone.groups.flat
        return RecordedDecodes(self._decode, self.kv, recording, rule, modules=modules, group=group)

    @property
    def _stored(self) -> Layout:
        return self._backbone.groups.layout

    def _decode(self, layout: Layout, tokens: Int64[Tensor, " t"], batch: RaggedBatch) -> Float[Tensor, "t v"]:
        """The logits of all tokens, with nothing left to the host that depends on them."""
        chosen = None if layout == self._stored else layout
        steps = self._backbone.ragged_steps(tokens, batch, self.kv, None, has_tail=False, layout=chosen)
        logits: Tensor = self._head(comm.run(steps))
        return logits

    @torch.no_grad()
    def __call__(self, batch: RaggedBatch, tokens: Int64[Tensor, " t"], rows: Sequence[int]) -> Float[Tensor, "rows v"]:
        """Append the batch's tokens to the cache, and give the logits of some rows.

        In:    ids of all T tokens, and a batch of `kv`'s, the same on every rank.
        Out:   [R, V], replicated; nothing is computed for other rows than the last layer must.
        Comm:  an all-reduce for the embedding, the layers' own, a gather of the rows and one of their logits.

        Args:
            batch: the step.
            tokens: its ids.
            rows: whose logits are wanted, increasing.
        """
        self.calls += 1
        layout, logits = self._backbone.layout_of(batch), None
        if self.recorded is not None:
            logits = self.recorded(self._stored if layout is None else layout, batch, tokens)
        if logits is not None:
            every = list(rows) == list(range(len(tokens)))
            return logits if every else logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]
        steps = self._backbone.ragged_steps(tokens, batch, self.kv, rows, has_tail=self._has_tail, layout=layout)
        hidden = comm.run(steps)
        if not rows:
            return hidden.new_zeros(0, self.vocab_size)
        found: Tensor = self._head(hidden)
        return found
