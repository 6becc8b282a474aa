"""Which products are large enough for skipping to gain more than it costs to start them by themselves."""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING

from ._environment import read_skip_from

if TYPE_CHECKING:
    import torch

#: Multiply-adds from which a product gains on a CPU, for any p from 0.3 on: with AVX2 and 1 thread, small linear layers
#: that skip take more than twice as long as torch's (benchmarks/small_products.py, results/small_products.md).
ON_CPU = 96_000_000


def _asked_for() -> int | None:
    try:
        return read_skip_from(os.environ)
    except ValueError as error:
        warnings.warn(f"sd-plugin: {error}; it is ignored", stacklevel=2)
        return None


#: The same for all devices, as ``SD_PLUGIN_SKIP_FROM`` wants it; None: what was measured. Read once.
ASKED_FOR: int | float | None = _asked_for()


def product_pays(multiply_adds: int, device: torch.device) -> bool:
    """A product of this size, rows · columns · units, gains from skipping.

    Elsewhere than on a CPU each does, until somebody has measured it.
    """
    return multiply_adds >= _least(device, elsewhere=0)


def step_pays(multiply_adds: int, device: torch.device) -> bool:
    """One time step of a decoder gains from skipping: all its layers together are of this size.

    Elsewhere than on a CPU none does: a GPU is done with a step before Python has started it.
    """
    return multiply_adds >= _least(device, elsewhere=math.inf)


def _least(device: torch.device, elsewhere: float) -> float:
    if ASKED_FOR is not None:
        return ASKED_FOR
    return ON_CPU if device.type == "cpu" else elsewhere
