"""The table of features: what it says of this library stands on tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "features.md"


@cache
def defined_in(path: Path) -> set[str]:
    """Functions of a file that pytest would collect."""
    return {
        each.name
        for each in ast.parse(path.read_text()).body
        if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")
    }


def rows(heading: str) -> list[list[str]]:
    """Cells of the lines of the table whose head begins with these columns."""
    lines = PAGE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_feature_stands_on_tests_that_are_there() -> None:
    claimed = {cells[0]: cells[-1].strip("*") for cells in rows("| Feature |")}
    linked = {
        cells[0]: re.findall(r"`(tests/\S+?\.py)::(test_\w+)`", cells[1]) for cells in rows("| feature | tests |")
    }
    assert len(claimed) > 35 and claimed["TP column/row linear"] == "Y"
    for feature, claim in claimed.items():
        assert claim[0] in "YP–n", f"{feature}: {claim}"
        assert bool(linked.get(feature)) == (claim[0] in "YP"), f"{feature} says {claim}"
    missing = [
        f"{path}::{name}"
        for path, name in {each for tests in linked.values() for each in tests}
        if not (ROOT / path).is_file() or name not in defined_in(ROOT / path)
    ]
    assert not missing, missing
    assert linked.keys() <= claimed.keys()


def test_every_line_has_all_columns() -> None:
    lengths = {len(cells) for cells in rows("| Feature |")}
    assert lengths == {11}, lengths
