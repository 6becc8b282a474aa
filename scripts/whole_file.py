"""Files that are at any moment the old one or the new one, whole, whatever ends the process that writes them."""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file under another name, hidden, and give it its own when it is on the disk. Text is written in UTF-8.

    Raises:
        OSError: it cannot be written; the old one is still there, and nothing else. UnicodeEncodeError: it is no text.
    """
    # Here, since it takes longer to import than those who only need `sync` take to run.
    from sd_plugin.kernels import leftovers

    encoded = content.encode() if isinstance(content, str) else content
    partial = leftovers.partial(path.with_name(f".{path.name}"))
    try:
        with partial.open("wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        # Not before the bytes are on the disk: else a power cut could leave the new name with nothing in it.
        partial.replace(path)
    except BaseException as error:  # an interruption, too
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk, so that no later rename overtakes its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
