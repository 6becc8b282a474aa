"""The CUDA sources: one string per translation unit, so that NVRTC and its cache need no files and no headers."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "src"
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


@cache
def read(name: str) -> str:
    """``src/NAME.cu`` with every file of this folder that it includes in place, once each.

    Raises:
        FileNotFoundError: there is no such source.
    """
    seen: set[str] = set()

    def inline(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        return _INCLUDE.sub(lambda found: inline(found[1]), (FOLDER / file).read_text(encoding="utf-8"))

    return inline(f"{name}.cu").replace("#pragma once\n", "")


def names() -> list[str]:
    """Every translation unit there is."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))
