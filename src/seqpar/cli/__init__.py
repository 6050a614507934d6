"""The command line: `python -m seqpar plan | calibrate | simulate | info`.

A command's module is imported once its arguments are sound, so help and most bad values do not wait for PyTorch. What
is refused, here or by the library, is one line on stderr and exit 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from seqpar.cli.arguments import parser

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return int(importlib.import_module(f"seqpar.cli.{options.command}").run(options))
    except (ValueError, OSError) as error:
        print(f"python -m seqpar {options.command}: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"`{error.filename}` must be a file that can be read or written, got: {error.strerror}"
    return " ".join(str(error).split())
