"""Where the rows of each time step lie in an activation, for kernels and for loops over steps."""

from __future__ import annotations

from collections import OrderedDict
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
    """Those of activation ``x``; made once for each layout and stream.

    Raises:
        RuntimeError: a CUDA graph is being captured, and none were made before.
    """
    count, batch, device = steps.count(x), steps.batch(x), x.device
    layout = (steps, count, batch, device)
    made = _made.setdefault(layout, {})
    _made.move_to_end(layout)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if x.is_cuda else 0
    # What was copied on another stream may not be there yet, unless a graph is captured: its warm-up is over.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    found = made.get(stream) or (next(iter(made.values()), None) if capturing else None)
    if found is None:
        if capturing:
            raise RuntimeError("run the layer once with these shapes before it is captured in a CUDA graph")
        found = made[stream] = _rows(steps, count, batch, device)
    if capturing:
        _captured[id(found)] = found
    while len(_made) > _MOST:
        _made.popitem(last=False)
    return found


_MOST = 4096
#: Replays of a graph read them, however long ago it was captured.
_captured: dict[int, Rows] = {}
_made: OrderedDict[tuple[Steps, int, int, torch.device], dict[int, Rows]] = OrderedDict()


def _rows(steps: Steps, count: int, batch: int, device: torch.device) -> Rows:
    if steps.batch_sizes is not None:
        sizes, stride = steps.batch_sizes, 1
        starts = tuple(accumulate(sizes, initial=0))[:-1]
    else:
        sizes, stride = (batch,) * count, count if steps.time_dim == 1 else 1
        starts = tuple(range(count)) if steps.time_dim == 1 else tuple(range(0, count * batch, max(batch, 1)))
    if len(starts) != count:  # no rows at all
        starts = (0,) * count
    on_host = (torch.tensor(values, dtype=torch.int32) for values in (starts, sizes))
    first, active = (values.to(device, non_blocking=True) for values in on_host)
    return Rows(first, active, stride, count, batch, starts, sizes)
