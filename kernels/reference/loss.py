"""Cross entropy of each row in plain torch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gemm import opmath

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """See :func:`sd_plugin.kernels.cross_entropy_forward`."""
    rows = logits.to(opmath(logits.dtype))
    lse = rows.logsumexp(1)
    counts = target != ignore_index
    hit = rows.gather(1, target.where(counts, 0).unsqueeze(1)).squeeze(1)
    loss = (1 - label_smoothing) * (lse - hit)
    if label_smoothing:  # zero times the infinite loss of a masked column is not a number
        loss = loss + label_smoothing * (lse - rows.mean(1))
    return loss.where(counts, 0).to(logits.dtype), lse


def cross_entropy_backward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
) -> Tensor:
    """See :func:`sd_plugin.kernels.cross_entropy_backward`."""
    gradient = (logits.to(lse.dtype) - lse.unsqueeze(1)).exp_().sub_(label_smoothing / logits.shape[1])
    counts = target != ignore_index
    gradient.scatter_add_(
        1, target.where(counts, 0).unsqueeze(1), gradient.new_full((len(target), 1), label_smoothing - 1)
    )
    return (gradient * scale.to(lse.dtype).unsqueeze(1)).masked_fill_(~counts.unsqueeze(1), 0).to(logits.dtype)
