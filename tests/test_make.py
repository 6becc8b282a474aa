"""``make test``: both halves of the tests run, and what either one says counts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTEST = """#!/bin/sh
printf "%s\\n" "$*" >> "{told}"
case " $* " in *" --ignore "*) exit {rest} ;; *) exit {kernels} ;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.mark.parametrize(
    ("kernels", "rest", "passes"),
    [
        (0, 0, True), (1, 0, False), (0, 1, False), (1, 1, False), (2, 0, False), (3, 5, False), (0, 139, False),
        # PYTEST_ARGS selects nothing in one half; in both, it is wrong.
        (5, 0, True), (0, 5, True), (5, 1, False), (5, 5, False),
    ],
)  # fmt: skip
def test_both_halves_run_and_either_may_fail(kernels: int, rest: int, passes: bool, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program, told = tmp_path / "bin" / "pytest", tmp_path / "told"
    program.write_text(PYTEST.format(told=told, kernels=kernels, rest=rest))
    program.chmod(0o755)
    # A stand-in for the virtual environment, newer than what it would be made of.
    (tmp_path / ".stamp").touch()
    command = ["make", "-C", str(ROOT), f"VENV={tmp_path}", "PYTEST_ARGS=-k name", "test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is passes, done.stdout + done.stderr
    halves = told.read_text().splitlines()
    assert len(halves) == 2 and all("-k name" in half for half in halves)
    assert ["tests/kernels" in half and "--ignore" in half for half in halves] == [False, True]
