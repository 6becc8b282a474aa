"""salesforce/awd-lstm-lm on a modern torch: what has to give way so that its programs run as they are.

- torch >= 2.6 refuses to load whole modules (``weights_only``): the programs' own ``torch.load`` calls trust their
  files.
- ``finetune``, ``generate`` and ``pointer`` are older than what ``main`` saves, a list, and what the model returns,
  hidden states: the model is taken out of the list, and its output goes through the decoder.
- ``finetune`` indexes a loss, and ``pointer`` targets, that have no dimension any more: they get one.
- ``pointer`` calls ``.cuda()`` where there is no GPU: that does nothing then.
- A save that is interrupted leaves no checkpoint at all: saves go to a temporary name first.

Loading and saving are changed for calls from the checkout's own files only, the loss and the targets in a process that
runs the program in question.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _host_files
from ._host_files import Programs
from ._patcher import Patcher

#: The programs that work on a model which ``main.py`` has trained.
SIDE_PROGRAMS = ("finetune", "generate", "pointer")


def patch(patcher: Patcher, programs: Programs) -> None:
    """Make every change of the list above."""
    _host_files.patch(patcher, programs, "awd-lstm-lm", _model_alone)
    program = programs.running()
    if program == "finetune":
        _patch_cross_entropy(patcher)
    if program == "pointer":
        _patch_pointer(patcher)


def _model_alone(loaded: Any, caller: str) -> Any:
    """What ``main`` saved, as the other programs expect it."""
    saved_by_main = isinstance(loaded, list) and len(loaded) == 3 and isinstance(loaded[0], nn.Module)
    return loaded[0] if saved_by_main and caller in SIDE_PROGRAMS else loaded


def _patch_cross_entropy(patcher: Patcher) -> None:
    stock = nn.CrossEntropyLoss.forward

    @functools.wraps(stock)
    def forward(self: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> Tensor:
        loss = stock(self, input, target)
        return loss.view(1) if loss.dim() == 0 else loss

    patcher.set(nn.CrossEntropyLoss, "forward", forward)


def _patch_pointer(patcher: Patcher) -> None:
    utils: Any = importlib.import_module("utils")
    stock: Callable[..., tuple[Tensor, Tensor]] = utils.get_batch

    @functools.wraps(stock)
    def get_batch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        data, targets = stock(*args, **kwargs)
        return data, targets.view(-1, 1)

    patcher.set(utils, "get_batch", get_batch)
    if not torch.cuda.is_available():
        patcher.set(Tensor, "cuda", lambda self, *args, **kwargs: self)
