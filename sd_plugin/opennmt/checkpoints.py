"""Opens checkpoints of OpenNMT-py: all that the host would open, and no code in them where torch would run none.

Every place of this package that looks into one goes through :func:`load`. Needs no OpenNMT-py.
"""

from __future__ import annotations

import argparse
import collections
import errno
import os
import pickle
import re
import warnings
import zipfile
from typing import IO, Any

import torch

from ..errors import UsageError

#: From torch 2.6 on ``torch.load`` runs no code of a file unless told to. Before, its own safe way to load knew no way
#: to be told of the host's Namespace (2.2, 2.3).
_TORCH_IS_STRICT = torch.__version__ >= "2.6"
#: What makes torch 2.6 and later load a file that may hold code; here of all versions.
TRUST_VARIABLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
#: The number that every file of ``torch.save`` before torch 1.6 starts with, as pickles write it.
_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_ZIP_MAGIC = b"PK\x03\x04"


def load(path: str | os.PathLike[str], *, as_host: bool) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on the CPU.

    Args:
        path: the file, in torch's present format or in that before 1.6.
        as_host: as OpenNMT-py will load it a moment later, by this torch's default (before 2.6 that runs code in the
            file); tensors stay in the file where possible. False runs no code with any torch, unless the environment
            variable ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` is set, as torch from 2.6 on understands it.

    Returns:
        The dictionary, with the options under ``"opt"``.

    Raises:
        UsageError: there is no such file, it is damaged, it is none of OpenNMT-py, or torch must be told to trust it.
    """
    try:
        with warnings.catch_warnings():
            # The host's own call gives the same advice again.
            warnings.simplefilter("ignore")
            checkpoint = _load_as_host(path) if as_host else _load_no_code(path)
    except MemoryError:
        raise
    except Exception as error:  # broken bytes make unpickling fail in any way
        raise UsageError(_problem(path, error)) from error
    if not isinstance(checkpoint, dict) or not hasattr(checkpoint.get("opt"), "__dict__"):
        raise UsageError(f"{path} is not a checkpoint of OpenNMT-py")
    return checkpoint


def _load_as_host(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True)
    except Exception:
        # The old format cannot be mapped, nor a file of any format on some file systems.
        return torch.load(path, map_location="cpu")


def _load_no_code(path: str | os.PathLike[str]) -> Any:
    if os.environ.get(TRUST_VARIABLE, "").lower() in ("1", "y", "yes", "true"):
        return torch.load(path, map_location="cpu", weights_only=False)
    if not _TORCH_IS_STRICT:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_NoCode)
    torch.serialization.add_safe_globals([argparse.Namespace])
    return torch.load(path, map_location="cpu", weights_only=True)


#: The types that checkpoints are made of, besides torch's storages and dtypes, as pickles name them.
_KNOWN: dict[tuple[str, str], Any] = {
    ("__builtin__", "set"): set,
    ("argparse", "Namespace"): argparse.Namespace,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


class _Unpickler(pickle.Unpickler):
    """Knows the types that checkpoints are made of, and no others: a pickle may name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        value = _KNOWN.get((module, name))
        if value is None and module == "torch":
            value = getattr(torch, name, None)
            is_storage = isinstance(value, type) and issubclass(value, torch.storage.TypedStorage)
            value = value if is_storage or isinstance(value, torch.dtype) else None
        if value is None:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return value


class _NoCode:
    """What ``torch.load`` needs of the module ``pickle``."""

    __name__ = "pickle"
    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def _problem(path: str | os.PathLike[str], error: Exception) -> str:
    """One line on why a file could not be loaded."""
    if isinstance(error, FileNotFoundError):
        return f"no such file: {path}"
    # A file that ends too early is an invalid argument to torch.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"{path} cannot be read: {error.strerror or error}"
    if not os.path.getsize(path):
        return f"{path} is damaged: it is empty"
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(_ZIP_MAGIC):
        return _problem_of_zip(path, error)
    if _LEGACY_MAGIC in head:
        return f"{path} {_refused(error) or 'is damaged: it ends too early, or was changed'}"
    return f"{path} is not a checkpoint of OpenNMT-py"


def _problem_of_zip(path: str | os.PathLike[str], error: Exception) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return f"{path} is damaged: it ends too early"
    if not any(name.endswith("data.pkl") for name in names):
        return f"{path} is not a checkpoint of OpenNMT-py"
    return f"{path} {_refused(error) or 'is damaged: it was changed'}"


def _refused(error: Exception) -> str | None:
    """What torch does not load unless told to trust the file; None if that is not why it failed."""
    found = re.search(r"unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    if not isinstance(error, pickle.UnpicklingError) or found is None:
        return None
    return f"holds {found[1]}, which torch loads from trusted files only: set {TRUST_VARIABLE}=1 if you trust it"
