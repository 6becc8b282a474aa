"""Folders of this machine are nobody's business: they are cut from what is written. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def without_folders(text: str) -> str:
    """``text`` with every absolute path cut down to its last part."""
    words = []
    for word in text.split(" "):
        name, equals, value = word.rpartition("=")
        words.append(f"{name}{equals}{Path(value).name if os.path.isabs(value) else value}")
    return " ".join(words)
