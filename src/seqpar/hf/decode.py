"""`decode="auto"`: where decodes are computed, from times that were measured on the ranks at hand at the first one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from seqpar import comm
from seqpar.comm import Groups
from seqpar.hf.agreed import keep_first, read_first
from seqpar.partition import HeadMap
from seqpar.plan import DecodeChoice, DecodeCosts, calibrate_decode, decode

__all__ = ["AutoDecode"]


class AutoDecode:
    """Decides for the decodes of a cache that has not been moved whether to ship queries; the same on every rank.

    The first decode measures both ways at a few sizes (`plan.calibrate_decode`, some seconds), unless it is given the
    costs. The rule is a number of cached tokens for a number of requests, so a cache that grows changes sides once.

    Args:
        costs: measured earlier, or predicted (`plan.decode_costs`); then nothing is measured.
        file: where measured costs are kept: read if it is there, written by rank 0 once they have been measured.
        contexts: cached tokens of a request to measure, increasing; what holds at the last holds beyond it.

    Attributes:
        costs: those that it decides by; None until they have been measured.
        latest: the last decision.

    Raises:
        ValueError: both `costs` and `file` are given, or contexts that are not increasing.
    """

    def __init__(
        self,
        *,
        costs: DecodeCosts | None = None,
        file: str | PathLike[str] | None = None,
        contexts: Sequence[int] = (512, 2048, 8192, 32768),
    ) -> None:
        if costs is not None and file is not None:
            raise ValueError("`costs` must be given alone or left out for those of `file`, got both")
        if not contexts or contexts[0] < 1 or list(contexts) != sorted(set(contexts)):
            raise ValueError(f"`contexts` must be at least 1 and increasing, got {list(contexts)}")
        self.costs, self.contexts = costs, tuple(contexts)
        self.file = None if file is None else Path(file)
        self.latest: DecodeChoice | None = None

    def ships(self, cached: Sequence[int]) -> bool:
        """Whether to ship queries to requests of these lengths; `measure` must have been called, or costs given."""
        assert self.costs is not None, "measured before the first decision"
        self.latest = decode(self.costs, -(-sum(cached) // len(cached)), len(cached))
        return self.latest.method == "qship"

    def measure(
        self,
        heads: HeadMap,
        head_dim: int,
        *,
        groups: Groups,
        under: Groups,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Measure, unless there are costs already; `under` is the layout that decodes run under.

        Raises:
            ValueError: the file does not hold such costs, or cannot be written.
        """
        if self.costs is not None:
            return
        text = read_first(self.file, lambda file: DecodeCosts.load(file).to_json(), group=groups.flat)
        if text:
            self.costs = DecodeCosts.from_json(text)
            return
        show = groups.flat.rank() == 0 and sys.stderr.isatty()
        with comm.record(), tqdm(desc="measuring decodes", disable=not show, leave=False) as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self.costs = calibrate_decode(
                heads,
                head_dim,
                groups=groups,
                under=under,
                contexts=self.contexts,
                rounds=5,
                window=window,
                interleave=1,
                dtype=dtype,
                device=device,
                progress=tell,
            )
        keep_first(self.file, self.costs.save, group=groups.flat)

    def explain(self) -> str:
        """What was measured, where the two cross and what was chosen last; for people."""
        return "undecided: no decode has run so far" if self.latest is None else self.latest.explain()

    def __repr__(self) -> str:
        return f"AutoDecode({self.costs}, {self.file}, {self.contexts})"
