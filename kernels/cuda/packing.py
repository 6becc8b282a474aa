"""Weights by rows of units: what a dropped unit is one skipped row of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .driver import Unit, launch
from .precision import Precision

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 32
_THREADS = 256
#: Bytes of one asynchronous copy, of which rows are multiples.
COPY = 16


def by_units(weight: Tensor, precision: Precision, groups: int = 1) -> Tensor:
    """A weight ``[N, K]`` as ``[K, columns]``: ``N`` columns, and zeros up to a multiple of 16 bytes.

    Args:
        precision: that it is rounded to; ``STRICT`` leaves float32 as it is.
        groups: parts of the weight, one after the other in its rows, whose columns lie side by side in the result:
            column ``groups * u + g`` is row ``u`` of part ``g``.
    """
    outputs, units = weight.shape
    per_copy = COPY // weight.element_size()
    columns = -(-outputs // per_copy) * per_copy
    packed = weight.new_empty(units, columns)
    launch(
        Unit("pattern", (("SD_PRECISION", int(precision)),)), "pack_by_units", weight,
        -(-columns // _SIDE) * -(-units // _SIDE), _THREADS,
        weight.detach().contiguous(), packed, units, outputs, columns, groups, shared=_SIDE * (_SIDE + 1) * 4,
    )  # fmt: skip
    return packed
