"""A linear layer that skips the columns of its input which a structured dropout has zeroed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _capture, functional


class StructuredLinear(nn.Linear):
    """``nn.Linear`` in arguments, parameters and result; faster when its input carries a hint."""

    qconfig = _capture.NotQuantized()

    def forward(self, input: Tensor) -> Tensor:
        # (torch.jit.script compiles what is left without this branch.)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._forward(input)
        return F.linear(input, self.weight, self.bias)

    def _forward(self, input: Tensor) -> Tensor:
        if _capture.is_stock(self):
            return F.linear(input, self.weight, self.bias)
        if isinstance(input, _capture.Proxy):
            return _capture.as_node(self, super().forward, False, input)  # type: ignore[no-any-return]
        return functional.linear(input, self.weight, self.bias)

    @classmethod
    def adopt(cls, linear: nn.Linear) -> nn.Linear:
        """Make an existing ``nn.Linear`` skip, in place: same object, parameters and hooks.

        Only a plain ``nn.Linear`` is changed: a subclass has a product of its own.
        """
        if type(linear) is nn.Linear:
            linear.__class__ = cls
        return linear
