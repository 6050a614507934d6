"""`overlap="auto"`: cuts of each step from costs that were measured on the ranks at hand, when one was first needed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from seqpar import comm
from seqpar.comm import ProcessGroup
from seqpar.layers import ParallelAttention, ParallelDecoderLayer
from seqpar.partition import Layout
from seqpar.plan import LayerCosts, OverlapChoice, calibrate_layers, overlap

__all__ = ["AutoOverlap", "called_whole", "typical_layers"]

_LARGEST = 8192  # tokens of the largest prompt that is measured; costs go straight on from there
_KEPT = 64  # decisions


class _Step(NamedTuple):
    """All that a decision depends on, besides the costs."""

    q_lens: tuple[int, ...]
    cached: tuple[int, ...]
    last_rows: int | None
    layout: Layout | None


class AutoOverlap:
    """Decides for every step whether it is cut into chunks, and where; the same on every rank.

    The first step of at least `min_tokens` measures a layer or two (`plan.calibrate_layers`, for about as long as a few
    such steps take in them); one that is far longer than what was measured does so again, and so does the first step
    under another layout. Below the gate nothing is measured or decided, and decodes, where each request has one new
    token, always run whole.

    Args:
        min_tokens: smaller steps run whole.
        costs: measured earlier under the stored layout (`LayerCosts.load`); then nothing is measured under that one.
        chunks: numbers of chunks to consider.
        margin: what a cut must be predicted to save.

    Attributes:
        costs: those that it decides by, for each layout it has met; None stands for the stored one.
        latest: the decision on the last step that was above the gate.

    Raises:
        ValueError: a gate below two tokens, or numbers of chunks below two.
    """

    def __init__(
        self,
        *,
        min_tokens: int = 512,
        costs: LayerCosts | None = None,
        chunks: Sequence[int] = (2, 3, 4),
        margin: float = 0.03,
    ) -> None:
        if min_tokens < 2 or not chunks or min(chunks) < 2:
            raise ValueError(f"`min_tokens` and `chunks` must be at least 2, got {min_tokens} and {list(chunks)}")
        self.min_tokens, self.chunks, self.margin = min_tokens, tuple(chunks), margin
        self.costs: dict[Layout | None, LayerCosts] = {} if costs is None else {None: costs}
        self.latest: OverlapChoice | None = None
        self._whole: str | None = None
        self._reaches: dict[Layout | None, int] = {} if costs is None else {None: sys.maxsize}
        self._decided: dict[_Step, OverlapChoice] = {}

    def cuts_of(
        self,
        q_lens: Sequence[int],
        cached: Sequence[int],
        layers: nn.ModuleList,
        *,
        group: ProcessGroup,
        last_rows: int | None = None,
        layout: Layout | None = None,
    ) -> tuple[int, ...]:
        """Where to cut a step; nowhere below the gate, and while a layer is called as a whole.

        Args:
            q_lens: new tokens of each request.
            cached: tokens of each that are cached already.
            layers: the model's, to measure.
            group: all ranks.
            last_rows: rows that are wanted of the last layer, where it leaves out the others.
            layout: that the step runs under; the stored one by default.

        Comm:  three integers of each rank above the gate; more when it measures.
        """
        total = sum(q_lens)
        if total < self.min_tokens or max(q_lens) == 1:
            return ()
        try:
            comm.agree(next(called_whole(layers, "layers"), None), group=group)  # hooks may be on one rank alone
        except ValueError as error:  # nothing of it would overlap, and measuring would call its hooks
            self._whole = str(error)
            return ()
        self._whole = None
        if min(total, _LARGEST) > 2 * self._reaches.get(layout, 0):
            self.costs[layout] = self._measure(layers, min(total, _LARGEST), group, layout)
            self._decided.clear()
        costs = self.costs[layout]
        last_rows = last_rows if costs.last and last_rows != total else None
        key = _Step(tuple(q_lens), tuple(cached), last_rows, layout)
        if key not in self._decided:
            while len(self._decided) >= _KEPT:
                del self._decided[next(iter(self._decided))]
            self._decided[key] = overlap(
                costs,
                key.q_lens,
                num_layers=len(layers),
                prefix=key.cached,
                chunks=self.chunks,
                margin=self.margin,
                last_rows=last_rows,
            )
        self.latest = self._decided[key]
        return self.latest.cuts

    def explain(self) -> str:
        """Why the last step was cut as it was."""
        if self._whole is not None:
            return f"run whole: `{self._whole}` has hooks or a wrapper, so that nothing in it would overlap"
        if self.latest is not None:
            return self.latest.explain()
        return f"undecided: no step of at least {self.min_tokens} tokens so far; smaller ones and decodes run whole"

    def _measure(self, layers: nn.ModuleList, most: int, group: ProcessGroup, layout: Layout | None) -> LayerCosts:
        """Costs at a quarter, a half and all of that many tokens."""
        self._reaches[layout] = most
        show = group.rank() == 0 and sys.stderr.isatty()
        with comm.record(), tqdm(desc="measuring", disable=not show, leave=False) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            sizes = sorted({max(1, most // 4), max(1, most // 2), most})
            return calibrate_layers(
                typical_layers(layers), group=group, tokens=sizes, rounds=3, layout=layout, progress=tell
            )

    def __repr__(self) -> str:
        return f"AutoOverlap({self.min_tokens}, {self.costs}, {self.chunks}, {self.margin})"


def typical_layers(layers: nn.ModuleList) -> list[ParallelDecoderLayer]:
    """The first two of the layers with the most common window and kind of feed-forward."""
    known = [layer for layer in layers if isinstance(layer, ParallelDecoderLayer)]
    kinds = [
        (layer.self_attn.core.window, type(layer.mlp))
        for layer in known
        if isinstance(layer.self_attn, ParallelAttention)
    ]
    most = Counter(kinds).most_common(1)[0][0]
    return [layer for layer, kind in zip(known, kinds, strict=True) if kind == most][:2]


def called_whole(root: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules below `root` that have steps which `comm.call` would not join, so that nothing overlaps."""
    for name, child in root.named_children():
        below = f"{path}.{name}"
        if any(hasattr(type(module), "steps") for module in child.modules()):
            if comm.splits(child) or isinstance(child, nn.ModuleList):
                yield from called_whole(child, below)
            else:
                yield below
