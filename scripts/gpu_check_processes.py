"""``gpu_check.py``: programs that are started, and ended with all they have started themselves."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def wait(process: "subprocess.Popen[Any]", seconds: float) -> int:
    """Its exit status; killed with all it has started, which shares its session, after ``seconds``.

    Raises:
        subprocess.TimeoutExpired: it was.
    """
    try:
        return process.wait(seconds)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def run(command: Sequence[str], seconds: float, **options: Any) -> tuple[int, str]:
    """A program's exit status and what it printed; killed after ``seconds`` with all it has started.

    Raises:
        subprocess.TimeoutExpired: it was.
    """
    # Into a file: a pipe that nobody empties would stop the program.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True, **options
        )  # fmt: skip
        status = wait(process, seconds)
        printed.seek(0)
        return status, printed.read()


def read(path: Path) -> dict[str, Any]:
    """A JSON file, empty if it is not there."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found
