"""Every translation unit that the backend can ask for: what has to compile."""

from __future__ import annotations

from collections.abc import Iterator

from . import gemm, tiling
from .driver import Unit
from .precision import Precision


def every() -> Iterator[Unit]:
    """Each unit once, those of one source together."""
    for source in ("cell", "decoder", "loss", "pattern", "probes"):
        for precision in Precision:
            if source != "loss" or precision is not Precision.TF32:
                yield Unit(source, (("SD_PRECISION", int(precision)),))
    for precision in Precision:
        for tiles in gemm.TILES:
            for in_float in range(1 + (precision.dtype.itemsize == 2)):
                sizes = {"SD_PRECISION": int(precision), "SD_TILES": tiles, "SD_FLOAT_RESULT": in_float}
                yield Unit("gemm", tuple(sizes.items()))
        for tile in tiling.tiles(precision):
            yield tile.unit()
