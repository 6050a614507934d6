"""Makes Markdown of what docstrings have beyond Google style, so that the API reference shows it as it is meant.

- The lines that state placements and messages (`In:`, `Out:`, `Grad:`, `Comm:`, `Source:`) become a list; they would
  run together in one paragraph.
- An example (`>>> ...`) becomes a block of code.
- Arguments that share a description (`q_norm, k_norm: ...`) each get it.
- Brackets, asterisks and underlines of formulas are what they are, and no links and no emphasis.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

CONTRACT = re.compile(r"((?:In|Out|Grad|Comm|Sources?)(?:, (?:Out|Grad))?):\s+(?=\S)")
SHARED = re.compile(r"( {4})(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)")


class Contract(Extension):
    """Rewrites docstrings as they are read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    r"""A docstring as Markdown in Google style.

    >>> print(rewritten("Sum of `x`[T][M].\n\nIn:  x[T*M].\n     A shard.\nOut: [T]."))
    Sum of `x`[T]\[M].
    <BLANKLINE>
    - **In:** x[T\*M]. A shard.
    - **Out:** [T].
    >>> print(rewritten("Sum.\n\nArgs:\n    a, b: two\n        terms."))
    Sum.
    <BLANKLINE>
    Args:
        a: two terms.
        b: two terms.
    """
    return "\n\n".join("\n".join(_paragraph(lines.split("\n"))) for lines in re.split(r"\n\s*\n", text))


def _paragraph(lines: list[str]) -> list[str]:
    if lines[0].startswith(">>>"):
        return ["```pycon", *lines, "```"]
    found: list[str] = []
    inside = False  # of an entry of the contract, or of arguments that share a description
    names: list[str] = []
    for line in lines:
        head, shared = CONTRACT.match(line), SHARED.match(line)
        deeper = len(line) - len(line.lstrip())
        if head:
            if found and not found[-1].startswith("- **"):
                found.append("")
            found.append(f"- **{head[1]}:** {_literal(line[head.end() :], emphasis=True)}")
        elif shared:
            names = shared[2].split(", ")
            found += [f"    {name}: {_literal(shared[3])}" for name in names]
        elif inside and deeper and not names:
            found[-1] += " " + _literal(line.strip(), emphasis=True)
        elif names and deeper > 4:
            found[-len(names) :] = [f"{each} {_literal(line.strip())}" for each in found[-len(names) :]]
        else:
            names = []
            found.append(_literal(line))
        inside = bool(head) or (inside and deeper > 0)
        names = names if shared or deeper > 4 else []
    return found


def _literal(text: str, *, emphasis: bool = False) -> str:
    """Formulas outside of code as what they are."""
    parts = text.split("`")
    for n in range(0, len(parts), 2):
        parts[n] = parts[n].replace("][", "]\\[")
        if emphasis:
            parts[n] = re.sub(r"([*_])", r"\\\1", parts[n])
    return "`".join(parts)
