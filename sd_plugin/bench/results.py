"""The JSON file of a benchmark. Standard library only, so that tables and figures need nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError

KIND = "sd-plugin bench"
#: Raised when the meaning of the file changes; older files are still read.
#: 2: ``settings.precisions``; a workload's columns and products are of the first of them, those of the others in its
#: ``precisions``. A file of 1 has torch's default precision only.
SCHEMA = 2

Document = dict[str, Any]


def check_target(path: Path, force: bool) -> None:
    """Refuse, before anything is measured, a file that could not be written or would replace another.

    Raises:
        UsageError: as said.
    """
    if path.is_dir():
        raise UsageError(f"--json {path} is a folder; name a file")
    if path.exists() and not force:
        raise UsageError(f"--json {path} exists; --force replaces it")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"--json {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--json {path}: cannot write in {folder}")


def save(document: Document, path: Path) -> None:
    """Write to a temporary name in the same folder, then rename: under the final name there is never half a file."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # mkstemp's files are readable by their owner alone; results are not secret.
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load(path: Path) -> Document:
    """Read a file of :func:`save`.

    Raises:
        UsageError: there is none, or it is something else, or of a newer version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path} is not JSON") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise UsageError(f"{path} was not written by sd-plugin bench")
    if document["schema"] > SCHEMA:
        raise UsageError(f"{path} was written by a newer sd-plugin (schema {document['schema']}, this one: {SCHEMA})")
    return document
