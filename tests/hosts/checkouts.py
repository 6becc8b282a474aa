"""Real checkouts of host repositories: run against when they are there, skipped with the reason when not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HOSTS = Path(__file__).resolve().parents[3] / "hosts"


def checkout(name: str, variable: str) -> Path:
    """The folder that the environment variable names, or ``../hosts/NAME``; skips the test if there is none."""
    named = os.environ.get(variable, "").strip()
    folder = Path(named) if named else HOSTS / name
    if not folder.is_dir():
        pytest.skip(f"no checkout of {name}: set {variable}, or clone it to {Path('..', 'hosts', name)}")
    return folder
