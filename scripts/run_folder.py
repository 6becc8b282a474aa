"""The folder that a run writes to: made, held against other runs, and taken away again if nothing came of it.

A run that is killed takes nothing away; the next one does that for it. It knows such a folder by the file :data:`MARK`,
which the run puts into a folder that it makes and takes out with its first result, by the lock that nobody holds, and
by the lack of anything but what a run prepares. No other folder is touched.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from sd_plugin.errors import UsageError

MARK = ".no-result-yet"
_MARK_TEXT = "A run made this folder and has no result yet. If it was killed, the next run takes the folder away.\n"
#: How often, and how many seconds apart, a lock is tried: a run that looks for what it may take away holds it shortly.
_TRIES, _PAUSE = 25, 0.02


@contextlib.contextmanager
def held(path: Path, prepared: Collection[str] = ()) -> Iterator[None]:
    """Hold a folder, which is made if it is missing, and take away what runs that were killed left beside it.

    At the end a folder that has no result, and was not there before, is taken away, and so are the folders above it
    that were made with it. If this process is killed, the system lets go of the folder.

    Args:
        prepared: names of files that a run puts into it before its first result, which are none.

    Raises:
        UsageError: another run holds it. OSError: it cannot be made or written.
    """
    above = [folder for folder in path.parents if not folder.exists()]
    descriptor, is_made = _locked(path)
    mark = path / MARK
    try:
        # Better now than after the first epoch.
        tempfile.TemporaryFile(dir=path).close()
        if is_made:
            mark.write_text(_MARK_TEXT)
        _take_away_killed(path.parent, prepared)
        yield
    finally:
        if (is_made or mark.exists()) and _taken_away(path, descriptor, prepared):
            with contextlib.suppress(OSError):
                for folder in above:
                    folder.rmdir()
        mark.unlink(missing_ok=True)
        os.close(descriptor)


def has_result(path: Path) -> None:
    """The folder holds a result: it is not taken away."""
    (path / MARK).unlink(missing_ok=True)


def _locked(path: Path) -> tuple[int, bool]:
    """A descriptor of the folder, which is then locked, and whether the folder was made."""
    is_made, missing = False, None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        try:
            is_made = _made(path) or is_made
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            missing = None
        except FileNotFoundError as error:
            # A run that ends at this moment takes it away, or the folder above it.
            missing = error
            continue
        if _is_locked(path, descriptor):
            return descriptor, is_made
        os.close(descriptor)
    raise missing or UsageError(f"{path} is in use by another run")


def _made(path: Path) -> bool:
    """Make the folder; False if it is there."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
        return False
    return True


def _is_locked(path: Path, descriptor: int) -> bool:
    """Whether the folder, which was opened as ``descriptor``, could be locked, and is still there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been taken away, and perhaps made again, before that.
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _take_away_killed(folder: Path, prepared: Collection[str]) -> None:
    """Take away the folders in ``folder`` that runs have left that were killed before their first result."""
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if (path / MARK).is_file()]:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    # A run that holds it, this one too, makes this fail.
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _taken_away(path, descriptor, prepared)
                finally:
                    os.close(descriptor)


def _taken_away(path: Path, descriptor: int, prepared: Collection[str]) -> bool:
    """Whether a locked folder had no result, and is gone."""
    names = os.listdir(descriptor)
    if not all(name == MARK or name in prepared or (name[0] == "." and ".partial" in name) for name in names):
        return False
    try:
        # The mark goes last: a folder without it is nobody's.
        for name in sorted(names, key=MARK.__eq__):
            os.unlink(name, dir_fd=descriptor)
        path.rmdir()
    except OSError:
        return False
    return True
