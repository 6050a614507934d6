"""Writes the page of the walk-through of overlap from the cells of the example: python docs/walkthrough.py."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CELLS, PAGE = ROOT / "examples/overlap_walkthrough.py", ROOT / "docs/overlap-walkthrough.md"


def page(cells: str) -> str:
    r"""Cells as Markdown: prose without its comment signs, code in blocks.

    >>> print(page("# %% [markdown]\n# Say ![it](../docs/it.png).\n\n# %%\nx = 1\n"))
    Say ![it](it.png).
    <BLANKLINE>
    ```python
    x = 1
    ```
    <BLANKLINE>
    """
    parts = []
    for cell in re.split(r"^# %%", cells, flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        if "markdown" in kind:
            prose = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
            parts.append(prose.replace("](../docs/", "]("))
        else:
            parts.append(f"```python\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(CELLS.read_text()))
