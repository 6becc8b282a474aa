"""Drawing kept units in plain torch operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..storage import has_memory

if TYPE_CHECKING:
    from torch import Tensor


def kept_lists(noise: Tensor, count: int | None, p: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """See :func:`sd_plugin.kernels.kept_lists`."""
    if count is not None:
        return noise.topk(count, dim=1, sorted=False).indices.sort(1).values.int(), None
    return _padded(noise >= p), None


def _padded(keep: Tensor) -> Tensor:
    """``[T, k]`` ascending kept positions of ``keep`` ``[T, H]``, rows filled up with ``H``."""
    size = keep.shape[1]
    positions = torch.arange(size, dtype=torch.int32, device=keep.device)
    indices = torch.where(keep, positions, size).sort(1).values.int()
    if keep.device.type == "cpu" and keep.shape[0] and has_memory(keep):
        # Only here is the longest row known without waiting for a device.
        indices = indices[:, : max(1, int(keep.sum(1).max()))]
    return indices
