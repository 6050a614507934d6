"""Running what compiles Triton kernels.

A process either interprets Triton or compiles it, and the tests interpret: what compiles runs in a new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def compiled_apart(code: str) -> Any:
    """What `code`, which prints JSON, prints in a process that compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
