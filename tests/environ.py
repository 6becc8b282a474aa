"""The environment of programs that tests start."""

from __future__ import annotations

import os

#: What tests/conftest.py sets for all: products skip however small they are.
SKIP_FROM = "SD_PLUGIN_SKIP_FROM"


def clean(*others: str) -> dict[str, str]:
    """This process's environment without the plugin's variables but :data:`SKIP_FROM`.

    Args:
        others: beginnings of the names of further variables that are left out.
    """
    left_out = ("SD_PLUGIN", *others)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {SKIP_FROM: os.environ[SKIP_FROM]}
