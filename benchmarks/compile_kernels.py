"""Compile every Triton kernel for GPUs that are not here, and write down what each needs: `make kernels`.

Every configuration of every kernel, for every target that it is launched on, in docs/results/kernels.md and, for the
test that compares them with the sources, docs/results/kernels.json. It takes minutes, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import _fill_in

from seqpar.kernels.targets import TARGETS, compiled, every_variant, fingerprint, resources

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def needs(name: str, target: str) -> tuple[int, int, int] | str:
    """Registers, spilled bytes and bytes of shared memory, or why there is no code."""
    try:
        return tuple(resources(compiled(every_variant()[name], target)))  # type: ignore[return-value]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """One table for each kernel, a row for each configuration."""
    for kernel, names in groupby(found, key=lambda name: name.rsplit("/", 1)[0]):
        yield from ("", f"## {kernel}", "", f"| | {' | '.join(TARGETS)} |", "|---|" + "---:|" * len(TARGETS))
        for name in names:
            cells = (cell(found[name]["targets"].get(target), target) for target in TARGETS)
            yield f"| {name.rsplit('/', 1)[1]} | {' | '.join(cells)} |"


def cell(needed: list[int] | str | None, target: str) -> str:
    if needed is None:
        return ""
    if isinstance(needed, str):
        return "no code"
    registers, spilled, shared = needed
    more = f" / {-(-shared // 1024)}" if shared else ""
    over = " (**does not fit**)" if shared > TARGETS[target].shared_bytes else ""
    return f"{registers}{more}{over}{f' **spills {spilled} B**' if spilled else ''}"


def main() -> int:
    """Compile in as many processes as asked for, and write both files."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    args.add_argument("--only", default="", metavar="TEXT", help="print kernels with this in their name, write nothing")
    given = args.parse_args()
    variants = {name: variant for name, variant in every_variant().items() if given.only in name}
    wanted = [(name, target) for name, variant in variants.items() for target in variant.targets]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("fork")) as pool:
        needed = list(pool.map(needs, *zip(*wanted, strict=True), chunksize=4))
    found: dict[str, Any] = {name: {"source": fingerprint(each), "targets": {}} for name, each in variants.items()}
    for (name, target), need in zip(wanted, needed, strict=True):
        found[name]["targets"][target] = need
    failed = [
        (name, target, need) for (name, target), need in zip(wanted, needed, strict=True) if isinstance(need, str)
    ]
    for name, target, why in failed:
        print(f"{name} for {target}: {why}", file=sys.stderr)
    if given.only:
        print("\n".join(table(found)))
        return int(bool(failed))
    about = f"Compiled by Triton {version('triton')}: {len(variants)} configurations, {len(wanted)} times."
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in found)
    (RESULTS / "kernels.json").write_text(f'{{"triton": "{version("triton")}", "kernels": {{\n{entries}\n}}}}\n')
    _fill_in(RESULTS / "kernels.md", "\n".join([about, *table(found)]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
