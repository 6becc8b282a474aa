"""How a persistent LSTM kernel is cut into blocks: hidden units and rows of the batch that one block owns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from .driver import Properties, Unit
from .precision import Precision

THREADS = 256
WARPS = THREADS // 32
#: Entries of the counters of one slice of the batch: a cache line of its own.
COUNTER_STRIDE = 32
_UNIT_TILE = 16
_TILE_STAGES = 3


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


class Tile(NamedTuple):
    """What a block owns, and where it keeps its part of the recurrent weight.

    Attributes:
        precision: of the operands.
        units: hidden units, all four gates of each: 4, 8, 12 or 16.
        tiles: rows of the batch, in eights.
        w_stages: chunks of kept rows of the weight that a warp has on their way through shared memory; 0: the block's
            part of the weight stays there, whole.
    """

    precision: Precision
    units: int
    tiles: int
    w_stages: int

    @property
    def resident(self) -> bool:
        """The block's part of the weight stays in shared memory."""
        return self.w_stages == 0

    @property
    def batch(self) -> int:
        """Rows of the batch of one block."""
        return 8 * self.tiles

    @property
    def depth(self) -> int:
        """Kept units that one tensor-core product visits."""
        return 16 if self._size == 2 else 8

    @property
    def _size(self) -> int:
        """Bytes of an operand's element."""
        return self.precision.dtype.itemsize

    @property
    def h_stages(self) -> int:
        """Chunks of kept rows of ``h`` that a warp has on their way: no more than of the weight's."""
        return 6 if self.tiles <= 4 and self.w_stages != 4 else 4

    def unit(self) -> Unit:
        """The translation unit of this tile."""
        sizes = {
            "SD_PRECISION": int(self.precision),
            "SD_UNITS": self.units,
            "SD_TILES": self.tiles,
            "SD_RESIDENT": int(self.resident),
            "SD_H_STAGES": self.h_stages,
            "SD_W_STAGES": self.w_stages,
            "SD_TILE_STAGES": _TILE_STAGES,
        }
        return Unit("lstm", tuple(sizes.items()))

    def parts(self, hidden: int) -> int:
        """Blocks that share the hidden units."""
        return -(-hidden // self.units)

    def slices(self, batch: int) -> int:
        """Blocks that share the batch."""
        return -(-batch // self.batch)

    def _row(self) -> int:
        """Bytes of one row of the block's part of the weight in shared memory."""
        return (4 * self.units + 8) * self._size

    def _lists(self, count: int, listed: bool) -> int:
        return _aligned(3 * count * 4) if listed else 0

    def _padded_batch(self) -> int:
        return self.batch + 8 if self.batch % 16 == 0 else self.batch

    def forward_shared(self, hidden: int, count: int, listed: bool) -> int:
        """Bytes of shared memory of ``lstm_forward``; ``count`` kept units a step, ``listed`` or all."""
        weight = (hidden + 1) if self.resident else WARPS * self.w_stages * self.depth
        ring = self.h_stages * self.depth * self._padded_batch() * self._size
        pitch = 4 * self.batch + (4 if self.precision is Precision.STRICT else 8)
        sums = self.units * pitch * 4
        own = WARPS * max(ring, sums) + self.units * self.batch * 4
        return _aligned(weight * self._row()) + self._lists(count, listed) + own

    def backward_shared(self, hidden: int, count: int, listed: bool) -> int:
        """Bytes of shared memory of ``lstm_backward``."""
        weight = (hidden + 1) if self.resident else WARPS * _TILE_STAGES * _UNIT_TILE
        gradients = _aligned(4 * self.units * self._padded_batch() * self._size)
        vectors = self.units * self.batch // 4
        groups = max(1, THREADS // vectors)
        sums = max(4, groups) * self.units * self.batch * 4
        factors = 2 * self.units * 4
        return _aligned(weight * self._row()) + self._lists(count, listed) + gradients + sums + factors

    def fits(self, hidden: int, batch: int, count: int, listed: bool, device: Properties) -> bool:
        """All blocks run at once, one on each multiprocessor, with the shared memory they need."""
        shared = max(self.forward_shared(hidden, count, listed), self.backward_shared(hidden, count, listed))
        return self.parts(hidden) * self.slices(batch) <= device.multiprocessors and shared <= device.shared_memory


def tiles(precision: Precision) -> Iterator[Tile]:
    """Every tile that there is a kernel for.

    Many rows of the batch leave no registers for the rest of a resident kernel with many units.
    """
    for units in (4, 8, 12, 16):
        for rows in (1, 2, 3, 4, 8):
            if rows < 8 or units <= 8:
                yield Tile(precision, units, rows, 0)
            if rows < 8 or units <= (8 if precision is Precision.STRICT else 12):
                yield Tile(precision, units, rows, 6 if rows > 4 else 12 if rows < 4 and units <= 12 else 8)
            if rows < 8 and units >= 12:  # as many as a GPU with less shared memory has room for
                yield Tile(precision, units, rows, 4)


@cache
def choose(precision: Precision, hidden: int, batch: int, count: int, listed: bool, device: Properties) -> Tile | None:
    """The tile that should take the least time; None where none fits.

    Args:
        count: kept units a step; listed: they are a list, not all.
    """
    fitting = [tile for tile in tiles(precision) if tile.fits(hidden, batch, count, listed, device)]
    return min(fitting, key=lambda tile: _microseconds(tile, hidden, batch, count), default=None)


#: Of one multiprocessor of an H100, each microsecond: bytes from L2, bytes of shared memory, multiply-adds.
_L2_BYTES = 41_600.0
_SHARED_BYTES = 218_000.0
_MULTIPLY_ADDS = {Precision.STRICT: 0.11e6, Precision.TF32: 1.1e6, Precision.F16: 2.2e6, Precision.BF16: 2.2e6}


#: A stream with fewer stages waits for L2 now and then.
_SHALLOW = {4: 1.2}


def _microseconds(tile: Tile, hidden: int, batch: int, count: int) -> float:
    """Estimated time of a step, forward and backward, without what does not depend on the tile."""
    parts, size = tile.parts(hidden), tile.precision.dtype.itemsize
    products = count * 4 * tile.units * tile.batch / _MULTIPLY_ADDS[tile.precision]
    weight = count * 4 * tile.units * size
    from_shared = weight / _SHARED_BYTES
    exchanged = count * tile.batch * size
    shares = count * tile.batch * 4 + parts * tile.units * tile.batch * 4 * count / hidden
    streamed = 2 * weight * _SHALLOW.get(tile.w_stages, 1.0) if tile.w_stages else 0.0
    barriers = 2 * (1.0 + 0.002 * parts)
    return barriers + 2 * (products + from_shared) + (exchanged + shares + streamed) / _L2_BYTES
