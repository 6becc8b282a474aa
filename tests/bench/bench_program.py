"""``sd-plugin bench`` as the tests run it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..patience import PATIENCE


def environment(**more: str) -> dict[str, str]:
    """One thread, and no warnings but ours on standard error."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def bench(*arguments: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """``sd-plugin bench ARGUMENTS`` in a Python of its own, with no progress on standard error."""
    command = [sys.executable, "-m", "sd_plugin", "bench", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, env=environment(**environ)
    )


@dataclass(frozen=True)
class TinyRun:
    """A finished run: its file, what is in it, and what it printed."""

    path: Path
    document: dict[str, Any]
    printed: str
