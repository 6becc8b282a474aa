"""Ctrl-C while a program is still importing, which with torch takes seconds: one line and exit status 130.

A KeyboardInterrupt in the middle of an import is shown as a traceback of somebody else's code, and some modules turn it
into another error. To import this module first replaces it, if the program is one of this folder; nothing can be lost
yet. :func:`is_raised` gives Ctrl-C its usual meaning back. Standard library only, and little of it.
"""

import os
import signal
import sys
from types import FrameType

STATUS = 130


def _leave(number: int, frame: FrameType | None) -> None:
    # The modules that are half imported are not told, as they could not do anything sensible.
    os.write(2, b"interrupted\n")
    os._exit(STATUS)


def _is_program() -> bool:
    """Whether the file that Python was started with lies beside this one."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return path is not None and os.path.dirname(os.path.realpath(path)) == os.path.dirname(os.path.realpath(__file__))


def is_raised() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_over() -> None:
    """The program ends because of Ctrl-C: another one must not interrupt what it still says."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# Not if it is ignored, as it is for a program in the background.
if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
