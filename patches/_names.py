"""Names that a program's modules have already taken from a host: ``from host import function``, before the patch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any


def rebind(pairs: Iterable[tuple[object, object]]) -> None:
    """Make every global of a loaded module that *is* the first of a pair the second.

    What is not a module's global stays: a default argument, an attribute of a class, an entry of a list. So do the
    modules of this library, which mean the host's own function where they name one.

    Args:
        pairs: an object, and what takes its place. Compared by identity, so that no code of theirs runs.
    """
    replacements = {id(old): (old, new) for old, new in pairs}
    for names in _globals():
        # A copy, made in one go, because a thread may be importing.
        for name, value in names.copy().items():
            if id(value) in replacements:
                names[name] = replacements[id(value)][1]


def _globals() -> Iterator[dict[str, Any]]:
    """The globals of every loaded module, without running any code of one."""
    for name, module in sys.modules.copy().items():
        # Anything may stand there, and whatever asks an object that is loaded on demand loads it: vars() does.
        if issubclass(type(module), ModuleType) and name.partition(".")[0] != "sd_plugin":
            yield object.__getattribute__(module, "__dict__")
