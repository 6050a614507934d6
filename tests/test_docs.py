"""Every Python block of the documentation runs, on as many ranks as its page names; pages link to what is there.

The site itself is built by `make docs`, which fails at the first warning. What would make it fail for a page or a link
is tested here, without its tools.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
RANKS = re.compile(r"<!-- ranks: (\d+) -->")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
    if BLOCK.search(page.read_text())
)


def run_page(rank: int, p: int, page: str) -> int:
    """Run a page's blocks one after another as one module; returns how many there were."""
    import os
    import sys

    os.chdir(ROOT)
    text = (ROOT / page).read_text()
    module = sys.modules["docs_page"] = ModuleType("docs_page")  # where dataclasses look for their names
    namespace = module.__dict__
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


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown and GitHub make them, and those that it names itself."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    slugs = [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]
    twice = [slug for slug, count in Counter(slugs).items() if count > 1]
    assert not twice, f"{page.name} has headings of one name: {twice}"
    return {*slugs, *re.findall(r'<a id="([^"]+)"></a>', prose)}


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Links of a page to files and headings: as written, and what they lead to."""
    for match in LINK.finditer(page.read_text()):
        yield match[0], page.parent / match[1] if match[1] else page, match[2] or ""


def test_pages_link_to_pages_and_headings_that_exist() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for text, target, anchor in links(page):
            assert target.exists(), f"{page.name} links to {text}, which is not there"
            if anchor and "seqpar." not in anchor:  # those are made from docstrings
                assert anchor in anchors(target), f"{page.name} links to {text}, a heading that is not there"


def test_pages_of_the_site_link_within_it() -> None:
    for page in ROOT.glob("docs/**/*.md"):
        for text, target, _ in links(page):
            assert target.resolve().is_relative_to(ROOT / "docs"), f"{page.name} links to {text}, outside of the site"


def leaves(nav: Any) -> Iterator[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(each)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")]
    assert sorted(nav) == sorted(pages)


def test_every_picture_is_shown() -> None:
    shown = {target.resolve() for page in ROOT.glob("docs/**/*.md") for _, target, _ in links(page)}
    drawn = {picture.resolve() for picture in ROOT.glob("docs/**/*.png")}
    assert drawn <= shown, sorted(picture.name for picture in drawn - shown)


def test_the_walk_through_is_the_example() -> None:
    """`python docs/walkthrough.py` writes the page."""
    spec = importlib.util.spec_from_file_location("walkthrough", ROOT / "docs/walkthrough.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(module.CELLS.read_text())


@pytest.mark.parametrize("name", ["partition", "ragged", "kernels", "kv", "comm", "layers", "plan", "batching", "hf"])
def test_every_package_has_its_reference(name: str) -> None:
    assert f"::: seqpar.{name}\n" in (ROOT / f"docs/api/{name}.md").read_text()
    assert f"({name}.md)" in (ROOT / "docs/api/index.md").read_text()
