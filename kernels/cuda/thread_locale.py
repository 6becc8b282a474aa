"""The locale of this thread, which NVRTC changes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Give the thread back the locale that it had before.

    NVRTC 12.1, which torch 2.2 brings, leaves it at "C" when it has compiled. Python asks the locale how text is
    encoded, so from there on whatever the program reads or writes would be taken for ASCII.
    """
    uselocale = getattr(ctypes.CDLL(None), "uselocale", None)
    if uselocale is None:
        yield
        return
    uselocale.argtypes, uselocale.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = uselocale(None)
    try:
        yield
    finally:
        uselocale(before)
