"""A parallelized model as a function of a ragged batch: what `seqpar.batching` runs, without `generate`'s padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar import comm
from seqpar.hf.backbone import LMHead, ParallelBackbone
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

    Attributes:
        kv: the cache of this rank's heads.
        vocab_size: ids that the model knows.
        calls: steps so far.

    Comm:  a byte of each rank when it is made.

    Raises:
        TypeError: the model is not parallelized.
        ValueError: its rotary positions depend on the longest request, which would make tokens depend on the batch; its
            prefill or decode wants another cache than one by heads.
    """

    def __init__(self, model: PreTrainedModel, *, num_pages: int, page_size: int) -> None:
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
        self.kv = backbone.cache_spec().make(num_pages, page_size, None)
        self.vocab_size, self.calls = backbone.vocab_size, 0
        self._backbone, self._head = backbone, head
        self._has_tail = backbone.takes_tail()

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
        hidden = comm.run(self._backbone.ragged_steps(tokens, batch, self.kv, rows, has_tail=self._has_tail))
        if not rows:
            return hidden.new_zeros(0, self.vocab_size)
        logits: Tensor = self._head(hidden)
        return logits
