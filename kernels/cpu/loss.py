"""Cross entropy of each row: one call of the library forward and one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .library import adjacent, function
from .memory import empty

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """See :func:`sd_plugin.kernels.cross_entropy_forward`."""
    logits, target = adjacent(logits), target.contiguous()
    rows, columns = logits.shape
    lse, loss = logits.new_empty(rows), logits.new_empty(rows)
    function("sd_cross_entropy_forward", logits.dtype)(
        torch.get_num_threads(), rows, columns, logits.data_ptr(), logits.stride(0), target.data_ptr(), ignore_index,
        label_smoothing, lse.data_ptr(), loss.data_ptr(),
    )  # fmt: skip
    return loss, lse


def cross_entropy_backward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
) -> Tensor:
    """See :func:`sd_plugin.kernels.cross_entropy_backward`."""
    logits, target, scale = adjacent(logits), target.contiguous(), scale.to(logits.dtype).contiguous()
    dlogits = empty(*logits.shape, dtype=logits.dtype)
    function("sd_cross_entropy_backward", logits.dtype)(
        torch.get_num_threads(), *logits.shape, logits.data_ptr(), logits.stride(0), target.data_ptr(), ignore_index,
        label_smoothing, lse.data_ptr(), scale.data_ptr(), dlogits.data_ptr(),
    )  # fmt: skip
    return dlogits
