"""salesforce/awd-lstm-lm on a modern torch: what has to give way so that its programs run as they are.

- torch >= 2.6 refuses to load whole modules (``weights_only``): the programs' own ``torch.load`` calls trust their
  files.
- ``finetune``, ``generate`` and ``pointer`` are older than what ``main`` saves, a list, and what the model returns,
  hidden states: the model is taken out of the list, and its output goes through the decoder.
- ``finetune`` indexes a loss, and ``pointer`` targets, that have no dimension any more: they get one.
- ``pointer`` calls ``.cuda()`` where there is no GPU: that does nothing then.
- A save that is interrupted leaves no checkpoint at all: saves go to a temporary name first.

Every change concerns calls made by the checkout's own files only: others see torch as it is.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import IO, Any

import torch
from torch import Tensor, nn

from sd_plugin.errors import UsageError

from ._patcher import Patcher

#: The programs that work on a model which ``main.py`` has trained.
SIDE_PROGRAMS = ("finetune", "generate", "pointer")


class Programs:
    """The programs of one checkout."""

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.realpath(folder)

    def owner(self, path: str | None) -> str | None:
        """The name, without ending, of the checkout's file at ``path``; None if it is not one of them."""
        if not path:
            return None
        real = os.path.realpath(path)
        return os.path.splitext(os.path.basename(real))[0] if os.path.dirname(real) == self._folder else None

    def caller(self, frame: FrameType) -> str | None:
        """The name of the checkout's file whose code runs in ``frame``; None if it is not one of them."""
        return self.owner(frame.f_globals.get("__file__"))

    def running(self) -> str | None:
        """The name of the checkout's program that this process runs; None if it runs something else."""
        return self.owner(getattr(sys.modules.get("__main__"), "__file__", None))


class AtomicWriter(io.BufferedWriter):
    """A binary file that takes its name only when it is complete."""

    def __init__(self, path: str) -> None:
        self._target, self._partial = path, f"{path}.partial-{os.getpid()}"
        super().__init__(io.FileIO(self._partial, "w"))

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            super().close()
            os.unlink(self._partial)
        self.close()

    def close(self) -> None:
        """Put it in its place; what is there is replaced."""
        if self.closed:
            return
        self.flush()
        os.fsync(self.fileno())
        super().close()
        os.replace(self._partial, self._target)


def patch(patcher: Patcher, programs: Programs) -> None:
    """Make every change of the table above."""
    _patch_loading(patcher, programs)
    _patch_saving(patcher, programs)
    program = programs.running()
    if program == "finetune":
        _patch_cross_entropy(patcher)
    if program == "pointer":
        _patch_pointer(patcher)


def _patch_loading(patcher: Patcher, programs: Programs) -> None:
    stock = torch.load

    @functools.wraps(stock)
    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        caller = programs.caller(sys._getframe(1))
        if caller is None:
            return stock(f, *args, **kwargs)
        kwargs.setdefault("weights_only", False)
        try:
            loaded = stock(f, *args, **kwargs)
        except (EOFError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError) as error:
            name = f if isinstance(f, (str, os.PathLike)) else getattr(f, "name", "the file")
            reason = (str(error).splitlines() or [""])[0]
            raise UsageError(
                f"{name} is damaged, or no file of awd-lstm-lm: {reason or type(error).__name__}"
            ) from error
        saved_by_main = isinstance(loaded, list) and len(loaded) == 3 and isinstance(loaded[0], nn.Module)
        return loaded[0] if saved_by_main and caller in SIDE_PROGRAMS else loaded

    patcher.set(torch, "load", load)


def _patch_saving(patcher: Patcher, programs: Programs) -> None:
    stock = torch.save

    @functools.wraps(stock)
    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, str) or programs.caller(sys._getframe(1)) is None:
            stock(obj, f, *args, **kwargs)
            return
        with AtomicWriter(f) as file:
            stock(obj, file, *args, **kwargs)

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        atomic = mode == "wb" and isinstance(file, str)
        return AtomicWriter(file) if atomic else open(file, mode, *args, **kwargs)

    patcher.set(torch, "save", save)
    main = sys.modules.get("__main__")
    # The programs open the file before torch.save sees it, which already empties it.
    if isinstance(main, ModuleType) and programs.running() is not None and "open" not in vars(main):
        patcher.set(main, "open", open_)


def _patch_cross_entropy(patcher: Patcher) -> None:
    stock = nn.CrossEntropyLoss.forward

    @functools.wraps(stock)
    def forward(self: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> Tensor:
        loss = stock(self, input, target)
        return loss.view(1) if loss.dim() == 0 else loss

    patcher.set(nn.CrossEntropyLoss, "forward", forward)


def _patch_pointer(patcher: Patcher) -> None:
    import utils

    stock: Callable[..., tuple[Tensor, Tensor]] = utils.get_batch

    @functools.wraps(stock)
    def get_batch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        data, targets = stock(*args, **kwargs)
        return data, targets.view(-1, 1)

    patcher.set(utils, "get_batch", get_batch)
    if not torch.cuda.is_available():
        patcher.set(Tensor, "cuda", lambda self, *args, **kwargs: self)
