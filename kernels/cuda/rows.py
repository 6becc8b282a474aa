"""Where the rows of each time step lie in an activation, for kernels and for loops over steps."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..steps import Steps


class Rows(NamedTuple):
    """Rows of step ``t`` in a contiguous ``[R, K]`` matrix: ``first[t] + b * stride`` for ``b < active[t]``."""

    first: Tensor  #: ``[T]`` int32, on the device
    active: Tensor  #: ``[T]`` int32, on the device
    stride: int
    steps: int
    batch: int
    starts: tuple[int, ...]  #: ``first`` again, on the host
    sizes: tuple[int, ...]  #: ``active`` again


def rows_of(x: Tensor, steps: Steps) -> Rows:
    """Those of activation ``x``; made once for each layout, so that a captured graph finds them made."""
    return _rows(steps, steps.count(x), steps.batch(x), x.device)


@lru_cache(maxsize=4096)
def _rows(steps: Steps, count: int, batch: int, device: torch.device) -> Rows:
    if steps.batch_sizes is not None:
        sizes, stride = steps.batch_sizes, 1
        starts = tuple(accumulate(sizes, initial=0))[:-1]
    else:
        sizes, stride = (batch,) * count, count if steps.time_dim == 1 else 1
        starts = tuple(range(count)) if steps.time_dim == 1 else tuple(range(0, count * batch, max(batch, 1)))
    if len(starts) != count:  # no rows at all
        starts = (0,) * count
    first, active = (torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True) for values in (starts, sizes))
    return Rows(first, active, stride, count, batch, starts, sizes)
