"""Cross entropy of large vocabularies that never holds the log-softmax: less memory, fewer passes over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _capture, kernels
from ._compile import opaque
from .functional import Operation, once_differentiable


class _CrossEntropy(Operation):
    """The loss of each row, ``[R]``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
        loss, lse = kernels.cross_entropy_forward(logits, target, ignore_index, label_smoothing)
        ctx.save_for_backward(logits, target, lse)
        ctx.options = (ignore_index, label_smoothing)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        ignore_index, label_smoothing = ctx.options
        gradient = kernels.cross_entropy_backward(logits, target, ignore_index, label_smoothing, lse, scale)
        return gradient, None, None, None


@opaque
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of ``[R, V]`` logits and ``[R]`` class indices; the same value.

    It has no second derivative, and the logits must not be modified in place before the backward pass.

    Raises:
        ValueError: ``reduction`` or ``label_smoothing`` is out of range, or shapes disagree. IndexError: a target is no
            class.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    loss: Tensor = _CrossEntropy.apply(logits, target, ignore_index, label_smoothing)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / (target != ignore_index).sum()
    raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")


class FusedCrossEntropyLoss(nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` in arguments and value; :func:`cross_entropy` where that applies.

    It does for int64 class indices ``[R]`` without class weights, where a backend is made for the dtype of the logits.
    What ``torch.compile``, ``torch.export``, ``torch.fx`` and ``torch.jit`` record is torch's own.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        # (torch.jit.script compiles what is left without this branch.)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._forward(input, target)
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _forward(self, input: Tensor, target: Tensor) -> Tensor:
        if isinstance(input, _capture.Proxy):
            return _capture.as_node(self, super().forward, False, input, target)  # type: ignore[no-any-return]
        if _capture.is_recorded(input):
            return super().forward(input, target)
        indices = input.dim() == 2 and target.dim() == 1 and target.dtype == torch.int64
        if self.weight is not None or not indices or not _is_supported(input):
            return super().forward(input, target)
        return cross_entropy(input, target, self.ignore_index, self.reduction, self.label_smoothing)

    @classmethod
    def adopt(cls, criterion: nn.Module) -> nn.Module:
        """Make an existing ``nn.CrossEntropyLoss`` one of this class, in place; any other criterion is left alone."""
        if type(criterion) is nn.CrossEntropyLoss:
            criterion.__class__ = cls
        return criterion


def _is_supported(logits: Tensor) -> bool:
    return kernels.choose_for("cross_entropy", logits, counted=False).name != "reference"
