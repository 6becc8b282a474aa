"""Autocast for the library's own autograd functions, on every supported torch version."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, overload

import torch

if TYPE_CHECKING:
    from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast runs products in on this device type; None when autocast is off."""
    if device_type == "meta":  # which has no autocast, and raises if it is asked
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    # torch < 2.4 has one pair of functions per device type.
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


@overload
def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]: ...
@overload
def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]: ...
def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` in autocast's dtype when it is on, as it does for ``nn.LSTM`` and ``nn.Linear``.

    float64 tensors are left alone, as by autocast itself.
    """
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which products run in their operands' own dtype, forward or backward."""
    # Not every device type has an autocast to switch off.
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
