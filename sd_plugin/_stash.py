"""Intermediate results of a differentiable operation, handed to autograd as tensors: it frees them after backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor."""

    index: int


def save(ctx: Any, *values: Any) -> None:
    """Save tensors, and tuples and lists of tensors and of other things, for :func:`saved` in the backward pass."""
    tensors: list[Tensor] = []
    ctx.stash = _take(values, tensors)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Any:
    """What was given to :func:`save`."""
    return _give(ctx.stash, ctx.saved_tensors)


# Plain functions: a nested one that calls itself is a reference cycle, and would keep the tensors for the garbage
# collector to find.
def _take(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    return _rebuilt(value, [_take(part, tensors) for part in value]) if isinstance(value, (tuple, list)) else value


def _give(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.index]
    return _rebuilt(value, [_give(part, tensors) for part in value]) if isinstance(value, (tuple, list)) else value


def _rebuilt(value: tuple[Any, ...] | list[Any], parts: list[Any]) -> Any:
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
