"""Drawing kept units on the device, in one launch and without waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .driver import Unit, launch

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 256


def kept_lists(noise: Tensor, count: int | None, p: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """See :func:`sd_plugin.kernels.kept_lists`; rows of Bernoulli sampling have as many entries as there are units."""
    steps, units = noise.shape
    width = units if count is None else count
    kept = torch.empty(steps, width, dtype=torch.int32, device=noise.device)
    factors = torch.empty(steps, units, device=noise.device)
    words = units + 2 * _THREADS // 32 + 2 * _THREADS
    launch(
        Unit("pattern", (("SD_PRECISION", 0),)), "kept_lists", noise, steps, _THREADS,
        noise.float().contiguous(), kept, factors, float(p), float(scale), -1 if count is None else count, width, units,
        shared=-(-words // 4) * 16,
    )  # fmt: skip
    return kept, factors
