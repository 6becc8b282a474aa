"""Files of a checked-out host: a modern torch reads them, and a save that is interrupted leaves the former one.

Only calls from the checkout's own code are concerned: everybody else sees torch as it is.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import IO, Any

import torch

from sd_plugin.errors import UsageError
from sd_plugin.kernels import leftovers

from ._patcher import Patcher


class Programs:
    """The files of one checkout whose code may be running.

    Args:
        folder: the checkout; packages: its folders that hold more of its code, with all below them. Anything else in
            it, such as a virtual environment, is not its own.
    """

    def __init__(self, folder: Path, packages: tuple[str, ...] = ()) -> None:
        self._folder = os.path.realpath(folder)
        self._packages = tuple(os.path.join(self._folder, name, "") for name in packages)

    def owner(self, path: str | None) -> str | None:
        """The name, without ending, of the checkout's file at ``path``; None if it is not one of them."""
        if not path:
            return None
        real = os.path.realpath(path)
        own = os.path.dirname(real) == self._folder or real.startswith(self._packages)
        return os.path.splitext(os.path.basename(real))[0] if own else None

    def caller(self, frame: FrameType) -> str | None:
        """The name of the checkout's file whose code runs in ``frame``; None if it is not one of them."""
        return self.owner(frame.f_globals.get("__file__") or frame.f_code.co_filename)

    def running(self) -> str | None:
        """The name of the checkout's program that this process runs; None if it runs something else."""
        return self.owner(getattr(sys.modules.get("__main__"), "__file__", None))


class AtomicWriter(io.BufferedWriter):
    """A binary file that takes its name only when it is complete; until then what is there stays.

    Args:
        path: a link is followed, as by ``open``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._target = os.path.realpath(path)
        # Another process that saves to the same name must not write into this one's file.
        self._partial = str(leftovers.partial(self._target))
        super().__init__(io.FileIO(self._partial, "w"))
        if os.path.exists(self._target):
            shutil.copymode(self._target, self._partial)

    def __del__(self) -> None:
        # Nobody said that it is complete.
        if not self.closed:
            self.discard()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def discard(self) -> None:
        """Give up what was written."""
        # Closing writes what is left first, which fails again where there is no room.
        with suppress(OSError):
            super().close()
        with suppress(FileNotFoundError):
            os.unlink(self._partial)

    def close(self) -> None:
        """Put it in its place; if that fails, give it up."""
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
            super().close()
            os.replace(self._partial, self._target)
        except BaseException:
            self.discard()
            raise


def _writer(path: str | os.PathLike[str]) -> io.BufferedWriter:
    """For the whole of a file; a pipe or a device keeps its place."""
    is_special = os.path.exists(path) and not os.path.isfile(path)
    return open(path, "wb") if is_special else AtomicWriter(path)


Unwrap = Callable[[Any, str], Any]


def patch(patcher: Patcher, programs: Programs, host: str, unwrap: Unwrap = lambda loaded, caller: loaded) -> None:
    """Patch ``torch.load`` and ``torch.save`` for calls of the host's own, and ``open`` of its program.

    Args:
        host: its name, for messages.
        unwrap: what a call gets that loaded this; its other argument is the name of the calling file.
    """
    patcher.set(torch, "load", _loading(torch.load, programs, host, unwrap))
    patcher.set(torch, "save", _saving(torch.save, programs))
    main = sys.modules.get("__main__")
    # A program that opens the file itself has emptied it before torch.save sees it.
    if isinstance(main, ModuleType) and programs.running() is not None and "open" not in vars(main):
        patcher.set(main, "open", _open)


def _loading(stock: Callable[..., Any], programs: Programs, host: str, unwrap: Unwrap) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        caller = programs.caller(sys._getframe(1))
        if caller is None:
            return stock(f, *args, **kwargs)
        # torch >= 2.6 refuses whole modules otherwise.
        kwargs.setdefault("weights_only", False)
        try:
            loaded = stock(f, *args, **kwargs)
        except Exception as error:  # broken bytes make unpickling fail in any way
            # A file that ends too early is an invalid argument to torch; others that cannot be read say so themselves.
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
                raise
            name = f if isinstance(f, (str, os.PathLike)) else getattr(f, "name", "the file")
            reason = "it ends too early" if isinstance(error, OSError) else (str(error).splitlines() or [""])[0]
            raise UsageError(f"{name} is damaged, or no file of {host}: {reason or type(error).__name__}") from error
        return unwrap(loaded, caller)

    return load


def _saving(stock: Callable[..., None], programs: Programs) -> Callable[..., None]:
    @functools.wraps(stock)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)) or programs.caller(sys._getframe(1)) is None:
            stock(obj, f, *args, **kwargs)
            return
        with _writer(f) as file:
            stock(obj, file, *args, **kwargs)

    return save


def _open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
    if mode == "wb" and isinstance(file, (str, os.PathLike)) and not args and not kwargs:
        return _writer(file)
    return open(file, mode, *args, **kwargs)
