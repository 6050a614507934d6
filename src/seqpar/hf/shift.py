"""`shift="auto"`: the layout of each step from times that were measured on the ranks at hand, at the first step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from seqpar import comm
from seqpar.comm import ProcessGroup
from seqpar.hf.agreed import keep_first, read_first
from seqpar.hf.auto import called_whole, typical_layers
from seqpar.partition import Layout, layout_names
from seqpar.plan import ShiftChoice, StepCosts, calibrate_layouts, shift

__all__ = ["AutoShift"]


class AutoShift:
    """Decides for every step which layout it runs under, by its number of tokens; the same on every rank.

    The first step measures a layer or two in every layout at a few sizes (`plan.calibrate_layouts`, some seconds),
    unless it is given the costs.

    Args:
        costs: measured earlier; then nothing is measured.
        file: where measured costs are kept: read if it is there, written by rank 0 once they have been measured.
        tokens: sizes of steps to measure, increasing; times go by steps where kernels change, so few would not do.

    Attributes:
        choice: the decision; None until it has been taken.

    Raises:
        ValueError: both `costs` and `file` are given, or sizes that are not increasing.
    """

    def __init__(
        self,
        *,
        costs: StepCosts | None = None,
        file: str | PathLike[str] | None = None,
        tokens: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    ) -> None:
        if costs is not None and file is not None:
            raise ValueError("`costs` must be given alone or left out for those of `file`, got both")
        if not tokens or tokens[0] < 1 or list(tokens) != sorted(set(tokens)):
            raise ValueError(f"`tokens` must be at least 1 and increasing, got {list(tokens)}")
        self.file, self.tokens = None if file is None else Path(file), tuple(tokens)
        self.choice: ShiftChoice | None = None if costs is None else shift(costs)
        self._whole: str | None = None

    def layout_of(
        self, num_tokens: int, layers: nn.ModuleList, *, layouts: Sequence[Layout], stored: Layout, group: ProcessGroup
    ) -> Layout:
        """The layout of a step; the stored one as long as a layer that would be measured is called as a whole.

        Args:
            num_tokens: of the step, over all ranks.
            layers: the model's, to measure; all know the `layouts`.
            layouts: those to choose from.
            stored: the one that the weights are stored in.
            group: all ranks.

        Comm:  nothing once it has decided; before, a message of each rank, and what measuring takes.

        Raises:
            ValueError: costs of other layouts than those to choose from.
        """
        if len(layouts) == 1:
            return stored
        if self.choice is None:
            costs = self._read(group) or self._measure(layers, layouts, group)
            if costs is None:
                return stored
            self.choice = shift(costs)
        chosen = self.choice.layout_of(num_tokens)
        if chosen not in layouts:
            raise ValueError(
                f"`costs` must be of the layouts {layout_names(layouts)}, got some of "
                f"{tuple(chosen)}; measure them on these ranks"
            )
        return chosen

    def explain(self) -> str:
        """What was measured, where the layouts cross and what was chosen; a table for people."""
        if self.choice is not None:
            return self.choice.explain()
        if self._whole is not None:
            return f"the stored layout: `{self._whole}` has hooks or a wrapper, which measuring would call"
        return "undecided: no step has run so far"

    def _read(self, group: ProcessGroup) -> StepCosts | None:
        """The costs that rank 0 finds in the file, on every rank; None where there is none."""
        text = read_first(self.file, lambda file: StepCosts.load(file).to_json(), group=group)
        return StepCosts.from_json(text) if text else None

    def _measure(self, layers: nn.ModuleList, layouts: Sequence[Layout], group: ProcessGroup) -> StepCosts | None:
        """Measured costs of a whole stack, kept in the file; None while a layer is called as a whole."""
        try:
            comm.agree(next(called_whole(layers, "layers"), None), group=group)  # hooks may be on one rank alone
        except ValueError as error:
            self._whole = str(error)
            return None
        show = group.rank() == 0 and sys.stderr.isatty()
        with comm.record(), tqdm(desc="measuring layouts", disable=not show, leave=False) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            costs = calibrate_layouts(
                typical_layers(layers),
                layouts=layouts,
                group=group,
                num_layers=len(layers),
                tokens=self.tokens,
                progress=tell,
            )
        keep_first(self.file, costs.save, group=group)
        return costs

    def __repr__(self) -> str:
        costs = None if self.choice is None else self.choice.costs
        return f"AutoShift({costs}, {self.file}, {self.tokens})"
