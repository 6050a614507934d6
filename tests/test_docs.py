"""Every Python block of the README and the documentation runs, on the number of ranks that its page names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
RANKS = re.compile(r"<!-- ranks: (\d+) -->")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    if BLOCK.search(page.read_text())
)


def run_page(rank: int, p: int, page: str) -> int:
    """Run a page's blocks one after another, sharing their names; returns how many there were."""
    import os

    os.chdir(ROOT)
    text = (ROOT / page).read_text()
    namespace: dict[str, object] = {"__name__": "__docs__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block.group(1), page, "exec"), namespace)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str) -> None:
    ranks = RANKS.search((ROOT / page).read_text())
    assert ranks, f"{page} has code but does not say on how many ranks it runs: <!-- ranks: N -->"
    assert all(run_ranks(int(ranks.group(1)), run_page, page))


def test_pages_link_to_pages_that_exist() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
