"""Names for what a process writes until it is complete, and the removal of what processes that died left of it.

A killed process removes nothing. So such a name holds a tag that says whose it is, and whoever writes there next
removes what nobody works on any more: at once if its process ran on this machine since its last start and is gone,
otherwise (another machine that shares the folder, a number that another process has now) when it is a day old.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import shutil
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

#: Nobody works on a file for so long without writing to it.
_SECONDS = 24 * 3600.0
_TAG = re.compile(r"-([0-9a-f]{8})-(\d{1,10})(?!\d)")


def tag() -> str:
    """``MACHINE-PID``: eight hexadecimal digits and this process's number."""
    return f"{_machine()}-{os.getpid()}"


def partial(path: str | os.PathLike[str]) -> Path:
    """Where this process writes the file ``path`` until it is complete; what dead processes left of it is removed."""
    target = Path(path)
    remove(target.parent, f"{glob.escape(target.name)}.partial-*")
    return target.with_name(f"{target.name}.partial-{tag()}")


def remove(folder: Path, pattern: str) -> None:
    """Removes what matches ``pattern`` in ``folder`` and nobody works on any more.

    It removes what it can and raises nothing: other processes may do the same, and the folder may not be there.
    """
    with suppress(OSError):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if _is_abandoned(path):
                    delete(path)


def delete(path: Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder with all that is in it, if it is there.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    found = _TAG.search(path.name[path.name.rfind(".") :])
    if found is not None and found[1] == _machine() and not _runs(int(found[2])):
        return True
    return time.time() - path.lstat().st_mtime > _SECONDS


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


@cache
def _machine() -> str:
    """Tells apart where process numbers mean something else: machines, their starts, and containers."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        where = f"{start} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        where = platform.node()
    return hashlib.sha256(where.encode()).hexdigest()[:8]
