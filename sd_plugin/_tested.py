"""Which versions of torch the project is tested with. The documents name the same ones."""

from __future__ import annotations

import re

#: Oldest and newest, major and minor.
TORCH = ((2, 2), (2, 14))


def release(version: str) -> tuple[int, int] | None:
    """Major and minor of ``version``; None where it has none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def untested_torch(version: str) -> str | None:
    """What is unknown of torch ``version``, in one line; None if it is tested.

    A newer one is neither refused nor warned of: torch rarely takes back what this package uses, and a patch looks at
    what it replaces before it does. It is told where one asks, by ``sd-plugin doctor``.
    """
    oldest, newest = TORCH
    found = release(version)
    if found is not None and oldest <= found <= newest:
        return None
    tested = f"tested with {'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))}"
    if found is not None and found > newest:
        return f"torch {version} is newer than what this version of sd-plugin was {tested}"
    return f"torch {version} is not supported: {tested}"
