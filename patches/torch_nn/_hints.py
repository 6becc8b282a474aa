"""Hints, as the replacements meet them: `sd_plugin.hints`, loaded when the first unit is dropped.

It is not imported when torch is patched, which may be because this library has just imported it. Until somebody has
loaded it no tensor has a hint, so that a program in which nothing is dropped pays for one look at ``sys.modules``.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sd_plugin.hints import Hint
    from sd_plugin.kernels import Kept, Steps

#: Drawn patterns that a hint still holds -> the probability they were drawn with.
_probabilities: weakref.WeakKeyDictionary[Kept, float] = weakref.WeakKeyDictionary()


def find(x: Any) -> Hint | None:
    """The hint of ``x``, if that is an ordinary tensor and has one to trust."""
    if "sd_plugin.hints" not in sys.modules or type(x) is not torch.Tensor:
        return None
    return _lookup()(x)


@functools.cache
def _lookup() -> Callable[[Tensor], Hint | None]:
    from sd_plugin.hints import lookup

    return lookup


def note_probability(dropped: Tensor, p: float) -> None:
    """``dropped`` was dropped with probability ``p``."""
    hint = find(dropped)
    if hint is not None:
        _probabilities[hint.kept] = p


def probability(hint: Hint | None) -> float:
    """What the tensor with this hint was dropped with; 0 if that is not known."""
    return 0.0 if hint is None else _probabilities.get(hint.kept, 0.0)


def carry(source: Tensor, source_steps: Steps, target: Tensor, steps: Steps) -> Tensor:
    """`sd_plugin.hints.carry`, the probability included."""
    from sd_plugin import hints

    before, carried = hints.lookup(source), hints.carry(source, source_steps, target, steps)
    if before is not None and before.kept in _probabilities:
        note_probability(carried, _probabilities[before.kept])
    return carried
