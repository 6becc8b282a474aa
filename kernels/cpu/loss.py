"""Cross entropy of each row: one call of the library forward and one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .library import adjacent, function, pointer
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
        torch.get_num_threads(), rows, columns, pointer(logits), logits.stride(0), pointer(target), ignore_index,
        label_smoothing, pointer(lse), pointer(loss),
    )  # fmt: skip
    return loss, lse


def cross_entropy_backward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
) -> Tensor:
    """See :func:`sd_plugin.kernels.cross_entropy_backward`."""
    logits, target, scale = adjacent(logits), target.contiguous(), scale.to(logits.dtype).contiguous()
    dlogits = empty(*logits.shape, dtype=logits.dtype)
    function("sd_cross_entropy_backward", logits.dtype)(
        torch.get_num_threads(), *logits.shape, pointer(logits), logits.stride(0), pointer(target), ignore_index,
        label_smoothing, pointer(lse), pointer(scale), pointer(dlogits),
    )  # fmt: skip
    return dlogits
