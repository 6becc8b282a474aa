"""One call of a host's `nn.LSTM` with structured dropout, leaving the module itself as it is.

Hosts pickle whole modules into their checkpoints, so nothing may be stored in one and its class may not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sd_plugin.lstm import StructuredDropoutLSTM

if TYPE_CHECKING:
    from torch import Tensor


def structured(lstm: nn.LSTM, weights: Mapping[str, Tensor] | None = None, **options: Any) -> StructuredDropoutLSTM:
    """A module for one call of ``forward``, which shares the parameters of ``lstm``.

    Args:
        weights: to be used instead of its own, by the names `nn.LSTM` gives them; they need not be parameters.
        **options: of :meth:`StructuredDropoutLSTM.from_lstm`, errors likewise.

    Returns:
        Call its ``forward``, not the module: it has the hooks of ``lstm`` too, which then would run twice.
    """
    module = StructuredDropoutLSTM.from_lstm(lstm, **options)
    for name, weight in (weights or {}).items():
        # Not setattr, which takes parameters only, and would register them.
        module._parameters.pop(name, None)
        module.__dict__[name] = weight
        # What torch's own kernels are given; it notices a changed attribute only where a parameter was before.
        module._flat_weights[module._flat_weights_names.index(name)] = weight
    return module


def stock(lstm: nn.LSTM, weights: Mapping[str, Tensor] | None = None) -> StructuredDropoutLSTM:
    """The same for a call of `nn.LSTM`'s own kernels, without any dropout of this library."""
    return structured(lstm, weights, recurrent_dropout=0.0, mode="random")
