"""A linear layer that skips the columns of its input which a structured dropout has zeroed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from . import functional

if TYPE_CHECKING:
    from torch import Tensor


class StructuredLinear(nn.Linear):
    """``nn.Linear`` in arguments, parameters and result; faster when its input carries a hint."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)

    @classmethod
    def adopt(cls, linear: nn.Linear) -> nn.Linear:
        """Make an existing ``nn.Linear`` skip, in place: same object, parameters and hooks.

        Only a plain ``nn.Linear`` is changed: a subclass has a product of its own.
        """
        if type(linear) is nn.Linear:
            linear.__class__ = cls
        return linear
