"""Cross entropy of each row: one launch forward and one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .driver import Unit, driver, launch
from .precision import Precision

if TYPE_CHECKING:
    from torch import Tensor

# As in src/loss.cu.
_MOST_THREADS, _WARP = 512, 32
_TOTAL = 12  # bytes of what a warp hands over
_INT = 2**31
_PRECISIONS = {
    torch.float32: Precision.STRICT,
    torch.float16: Precision.F16,
    torch.bfloat16: Precision.BF16,
}


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """See :func:`sd_plugin.kernels.cross_entropy_forward`. A target that is no column stops the device, as torch's do.

    Returns:
        The loss in the dtype of ``logits``, and the logarithm of the sum of exponentials in float32.
    """
    unit, threads = _unit("logits", logits), _threads(logits)
    logits, target = _adjacent(logits), target.contiguous()
    rows, columns = logits.shape
    loss, lse = logits.new_empty(rows), logits.new_empty(rows, dtype=torch.float32)
    launch(
        unit, "cross_entropy_forward", logits, rows, threads,
        logits, target, loss, lse, float(label_smoothing), *_words(ignore_index), columns, logits.stride(0),
        shared=threads // _WARP * _TOTAL,
    )  # fmt: skip
    return loss, lse


def cross_entropy_backward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
) -> Tensor:
    """See :func:`sd_plugin.kernels.cross_entropy_backward`."""
    unit, threads = _unit("logits", logits), _threads(logits)
    logits, target, scale = _adjacent(logits), target.contiguous(), scale.float()
    rows, columns = logits.shape
    dlogits = logits.new_empty(rows, columns)
    launch(
        unit, "cross_entropy_backward", logits, rows, threads,
        logits, target, lse.float().contiguous(), scale, dlogits, float(label_smoothing), *_words(ignore_index),
        columns, logits.stride(0), scale.stride(0),
    )  # fmt: skip
    return dlogits


def _unit(name: str, tensor: Tensor) -> Unit:
    """
    Raises:
        TypeError: ``tensor`` is of another dtype, or on another kind of device.
    """
    if tensor.dtype not in _PRECISIONS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device.type != driver().device_type:
        raise TypeError(f"{name} must be on a {driver().device_type} device, got {tensor.device}")
    return Unit("loss", (("SD_PRECISION", int(_PRECISIONS[tensor.dtype])),))


def _threads(logits: Tensor) -> int:
    """Of a row's block: about four loads of 16 bytes for each, so that a short row does not wait for idle warps."""
    wanted = logits.shape[1] * logits.element_size() // 64
    return min(_MOST_THREADS, max(1, wanted // _WARP) * _WARP)


def _adjacent(logits: Tensor) -> Tensor:
    """``logits`` with columns side by side, and rows that an int is enough to tell apart."""
    if (logits.stride(1) == 1 or logits.shape[1] == 1) and 0 <= logits.stride(0) < _INT:
        return logits
    return logits.contiguous()


def _words(ignore_index: int) -> tuple[int, int]:
    """The lower and the upper half of an int64, as ints."""
    halves = ignore_index & 0xFFFFFFFF, ignore_index >> 32 & 0xFFFFFFFF
    low, high = (half - 2 * _INT if half >= _INT else half for half in halves)
    return low, high
