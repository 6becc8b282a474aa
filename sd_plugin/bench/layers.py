"""The modules in which the columns of a workload differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import functional
from ..dropout import StructuredDropout
from ..linear import StructuredLinear
from ..loss import FusedCrossEntropyLoss
from ..lstm import StructuredDropoutLSTM
from .columns import DENSE, NR_RH_ST, SKIPPING, STOCK

if TYPE_CHECKING:
    from torch import Tensor


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The projection of the column ours-dense: ``x Wᵀ + b`` by this library's kernels, nothing skipped."""
    return functional.linear(x, weight, bias, native=False)


class DenseLinear(nn.Linear):
    """``nn.Linear`` whose product is :func:`dense_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return dense_linear(input, self.weight, self.bias)

    @classmethod
    def adopt(cls, linear: nn.Linear) -> None:
        """Make an existing linear layer dense, in place."""
        linear.__class__ = cls


def linear(column: str, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer whose input is a dropped tensor."""
    kind = {STOCK: nn.Linear, DENSE: DenseLinear}.get(column, StructuredLinear)
    return kind(inputs, outputs, bias=bias)


def cross_entropy(column: str, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Cross entropy of ``[R, V]`` logits: torch's in the column stock, what the plugin makes of it in the others."""
    if column == STOCK:
        return nn.functional.cross_entropy(logits, target, **options)
    loss: Tensor = FusedCrossEntropyLoss(**options)(logits, target)
    return loss


def dropout(column: str, p: float, site: str, batch_first: bool = False) -> nn.Module:
    """Dropout of a ``[T, B, K]`` tensor: random in the first two columns, structured and varying in the others."""
    return StructuredDropout(p, batch_first=batch_first, site=site) if column in SKIPPING else nn.Dropout(p)


def lstm(
    column: str,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    **options: Any,
) -> nn.LSTM:
    """An LSTM of ``column``; only NR+RH+ST gets the recurrent dropout.

    Every column but stock runs this library's kernels even where nothing can be skipped (``native=False``).
    """
    if column == STOCK:
        return nn.LSTM(input_size, hidden_size, num_layers, dropout=dropout, **options)
    return StructuredDropoutLSTM(
        input_size,
        hidden_size,
        num_layers,
        dropout=dropout,
        mode=column if column in SKIPPING else "random",
        recurrent_dropout=recurrent_dropout if column == NR_RH_ST else 0.0,
        native=False,
        **options,
    )


class LockedDropout(nn.Module):
    """Case II of the paper's Fig. 1, as AWD-LSTM has it: a random mask ``[1, B, K]`` for all time steps."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        mask = x.new_empty(1, x.shape[1], x.shape[2]).bernoulli_(1.0 - self.p).div_(1.0 - self.p)
        return x * mask


class DropConnectLSTM(nn.LSTM):
    """A one-layer ``nn.LSTM`` whose recurrent weight is dropped at random before every sequence (Merity et al. 2017).

    Args:
        weight_dropout: probability for each entry of ``weight_hh_l0``.
    """

    weight_hh_l0: Tensor

    def __init__(self, input_size: int, hidden_size: int, weight_dropout: float) -> None:
        super().__init__(input_size, hidden_size)
        self.weight_dropout = weight_dropout

    def flatten_parameters(self) -> None:
        """Nothing: the dropped weight lies elsewhere than the others (as AWD-LSTM's own WeightDrop does)."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        raw = self._flat_weights
        dropped = nn.functional.dropout(self.weight_hh_l0, self.weight_dropout, self.training)
        self._flat_weights = [raw[0], dropped, *raw[2:]]
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = raw


def detached(state: Any) -> Any:
    """Hidden states, nested as they come, cut off from the graph that made them."""
    if isinstance(state, torch.Tensor):
        return state.detach()
    return type(state)(detached(part) for part in state)
