"""The three sparse products: kernels that skip dropped units, or cuBLAS with zeros in place of them.

Operands and results may be of different dtypes for the LSTM layers, whose sums stay float32: :func:`fp`, :func:`bp` and
:func:`wg` are told the precision; the backend's functions take it from the operands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..steps import Steps
from . import choices
from .driver import Unit, driver, launch
from .packing import by_units
from .precision import Precision, cublas, of_products, product
from .rows import Rows, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..kept import Kept

# As in src/gemm.cu.
THREADS = 128
_STAGES = 3
_FP_COLUMNS, _FP_DEPTH = 128, 32
_BP_UNITS, _BP_BYTES = 64, 128
_WG_UNITS, _WG_COLUMNS = 64, 128
_KEEP_UNITS, _KEEP_ROWS = 1024, 8
#: Rows of one block of a kernel, in eights.
TILES = (1, 2, 3, 4, 6, 8)
_MOST_TILES = {"fp": 8, "bp": 8, "wg": 4}
_COPY = 16  # bytes of one asynchronous copy, of which rows of the weight are multiples


class PackedMatrix(NamedTuple):
    """A weight, by units."""

    rows: Tensor  #: ``[K, N]``, and zeros up to a multiple of 16 bytes
    columns: int  #: ``N``

    @property
    def matrix(self) -> Tensor:
        """``[K, N]``."""
        return self.rows[:, : self.columns]

    @property
    def units(self) -> int:
        """``K``."""
        return self.rows.shape[0]


def gemm_pack(weight_t: Tensor) -> PackedMatrix:
    """Pack ``[K, N]``. Not rounded: in what precision it is multiplied may change before it is."""
    _check("weight_t", weight_t)
    units, columns = weight_t.shape
    if weight_t.t().is_contiguous():  # as torch holds a weight
        plain = {torch.float16: Precision.F16, torch.bfloat16: Precision.BF16}.get(weight_t.dtype, Precision.STRICT)
        return PackedMatrix(by_units(weight_t.t(), plain), columns)
    per_copy = _COPY // weight_t.element_size()
    padded = -(-columns // per_copy) * per_copy
    rows = weight_t.new_empty(units, padded)
    rows[:, :columns] = weight_t.detach()
    rows[:, columns:] = 0
    return PackedMatrix(rows, columns)


def gemm_fp(x: Tensor, weight: PackedMatrix, kept: Kept | None, steps: Steps, bias: Tensor | None) -> Tensor:
    """``y_t = scale · x_t[:, kept_t] @ weight[kept_t, :] + bias``."""
    return fp(x, weight, kept, steps, of_products(x.dtype), bias=bias)


def gemm_bp(dy: Tensor, weight: PackedMatrix, kept: Kept | None, steps: Steps) -> Tensor:
    """``dx_t[:, kept_t] = scale · dy_t @ weight[kept_t, :].T``."""
    return bp(dy, weight, kept, steps, of_products(dy.dtype))


def gemm_wg(x: Tensor, dy: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
    """``dweight[kept_t, :] += scale · x_t[:, kept_t].T @ dy_t``; a transposed view of a contiguous ``[N, K]``."""
    return wg(x, dy, kept, steps, of_products(x.dtype))


def fp(
    x: Tensor,
    weight: PackedMatrix,
    kept: Kept | None,
    steps: Steps,
    precision: Precision,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`gemm_fp` with operands of ``precision.dtype``.

    Args:
        dtype: of the result: that of the operands (None), or float32.
        bias: of the operands' dtype.
    """
    _check("x", x, precision)
    _check("weight", weight.rows, precision)
    if bias is not None:
        _check("bias", bias, precision)
    rows = x.shape[:-1]
    if kept is None or not choices.skips("fp", precision, kept):
        x, scale = _dropped(x, kept, steps, precision)
        if bias is not None and scale == 1.0 and dtype in (None, x.dtype):
            with cublas(precision is Precision.TF32):
                y = torch.addmm(bias, x, weight.matrix)
        else:
            y = _finished(product(x, weight.matrix, precision, dtype), scale, bias)
        return _reshaped(y, *rows, weight.columns)
    blocks = _Blocks.of("fp", kept, steps, x)
    y = x.new_empty(*rows, weight.columns, dtype=dtype)
    stage = _FP_DEPTH * (_FP_COLUMNS + 8)
    launch(
        _unit(precision, blocks.tiles, y), "gemm_fp", x, blocks.grid(weight.columns, _FP_COLUMNS), THREADS,
        x.contiguous(), weight.rows, None if bias is None else bias.contiguous(), *blocks.tensors, y,
        *blocks.numbers, weight.units, weight.columns, weight.rows.shape[1], blocks.rows.stride,
        -(-weight.columns // _FP_COLUMNS), blocks.row_tiles,
        shared=_pipeline(blocks.tiles, stage, _FP_DEPTH, precision),
    )  # fmt: skip
    return y


def bp(
    dy: Tensor,
    weight: PackedMatrix,
    kept: Kept | None,
    steps: Steps,
    precision: Precision,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`gemm_bp` with operands of ``precision.dtype``; dtype: of the result, as for :func:`fp`."""
    _check("dy", dy, precision)
    _check("weight", weight.rows, precision)
    rows = dy.shape[:-1]
    if kept is None or not choices.skips("bp", precision, kept):
        dx = _reshaped(product(_flat(dy), weight.matrix.t(), precision, dtype), *rows, weight.units)
        return dx if kept is None else _keep(dx, dx, kept, steps, kept.scale)
    blocks = _Blocks.of("bp", kept, steps, dy)
    dx = dy.new_zeros(*rows, weight.units, dtype=dtype)
    depth = _BP_BYTES // dy.element_size()
    stage = _BP_UNITS * (depth + _COPY // dy.element_size())
    launch(
        _unit(precision, blocks.tiles, dx), "gemm_bp", dy, blocks.grid(kept.width, _BP_UNITS), THREADS,
        dy.contiguous(), weight.rows, *blocks.tensors, dx,
        *blocks.numbers, weight.units, weight.columns, weight.rows.shape[1], blocks.rows.stride,
        -(-kept.width // _BP_UNITS), blocks.row_tiles, shared=_pipeline(blocks.tiles, stage, depth, precision),
    )  # fmt: skip
    return dx


def wg(
    x: Tensor,
    dy: Tensor,
    kept: Kept | None,
    steps: Steps,
    precision: Precision,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`gemm_wg` with operands of ``precision.dtype``; dtype: of the result, as for :func:`fp`."""
    _check("x", x, precision)
    _check("dy", dy, precision)
    units, columns = x.shape[-1], dy.shape[-1]
    if kept is None or not choices.skips("wg", precision, kept):
        x, scale = _dropped(x, kept, steps, precision)
        return _finished(product(_flat(dy).t(), x, precision, dtype), scale, None).t()
    blocks = _Blocks.of("wg", kept, steps, x)
    dweight = x.new_empty(columns, units, dtype=dtype)
    tiles = -(-columns // _WG_COLUMNS)
    buffer = 8 * blocks.tiles * (_WG_COLUMNS + _WG_UNITS) + _WG_UNITS
    launch(
        _unit(precision, blocks.tiles, dweight), "gemm_wg", x, tiles * -(-units // _WG_UNITS), THREADS,
        x.contiguous(), dy.contiguous(), *blocks.tensors, dweight,
        *blocks.numbers, units, columns, blocks.rows.stride, blocks.rows.steps, tiles, blocks.row_tiles,
        shared=4 * (_WG_UNITS * (_WG_COLUMNS + 2) + 2 * buffer + 2 * THREADS),
    )  # fmt: skip
    return dweight.t()


class _Blocks(NamedTuple):
    """What the kernels are told of rows and kept units."""

    rows: Rows
    indices: Tensor
    kept_stride: int
    scale: float
    tiles: int
    row_tiles: int  #: of a step

    @classmethod
    def of(cls, phase: choices.Phase, kept: Kept, steps: Steps, x: Tensor) -> _Blocks:
        """Rows of each step; rows in blocks as big as the kernels take, where the same units are kept at every step."""
        indices = kept.indices if kept.width <= 1 or kept.indices.stride(1) == 1 else kept.indices.contiguous()
        most, stride = 8 * _MOST_TILES[phase], indices.stride(0)
        if kept.steps == 1 or stride == 0:
            stride, number = 0, x.shape[:-1].numel()
            full, rest = divmod(number, most)
            x, steps = x.new_empty(number, 0), Steps.packed([most] * full + [rest] * (rest > 0))
        rows = rows_of(x, steps)
        parts = max(1, -(-rows.batch // most))
        needed = -(-rows.batch // (8 * parts))
        tiles = next(tiles for tiles in TILES if tiles >= needed)
        return cls(rows, indices, stride, float(kept.scale), tiles, max(1, -(-rows.batch // (8 * tiles))))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of every kernel."""
        return self.indices, self.rows.first, self.rows.active

    @property
    def numbers(self) -> tuple[float, int, int]:
        """Those after the tensors."""
        return self.scale, self.kept_stride, self.indices.shape[1]

    def grid(self, size: int, tile: int) -> int:
        """Blocks of a kernel that has tiles of rows and of ``size`` of something else at each step."""
        return self.rows.steps * self.row_tiles * -(-size // tile)


def _unit(precision: Precision, tiles: int, result: Tensor) -> Unit:
    in_float = int(precision.dtype != torch.float32 and result.dtype == torch.float32)
    return Unit("gemm", (("SD_PRECISION", int(precision)), ("SD_TILES", tiles), ("SD_FLOAT_RESULT", in_float)))


def _pipeline(tiles: int, stage: int, depth: int, precision: Precision) -> int:
    """Bytes of stages of the weight, and of two of an activation, of ``depth`` elements of each row."""
    size = precision.dtype.itemsize
    return size * (_STAGES * stage + 2 * 8 * tiles * (depth + _COPY // size))


def _flat(x: Tensor) -> Tensor:
    """``[rows, K]``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _reshaped(y: Tensor, *shape: int) -> Tensor:
    """A product's result in another shape, which is to be nobody's view: torch's own products end like this."""
    reshaped: Tensor = torch.ops.aten._unsafe_view.default(y, shape)
    return reshaped


def _dropped(x: Tensor, kept: Kept | None, steps: Steps, precision: Precision) -> tuple[Tensor, float]:
    """``x`` ``[rows, K]`` with zeros for what is dropped, and the factor that is still to be multiplied.

    That is the scale for half types, in which an operand should not be rounded once more.
    """
    if kept is None:
        return _flat(x), 1.0
    if kept.width == kept.size and not kept.padded:
        return _flat(x), float(kept.scale)
    later = precision.dtype != torch.float32
    x = x.contiguous()
    dropped = _keep(x, torch.empty_like(x), kept, steps, 1.0 if later else float(kept.scale))
    return _flat(dropped), float(kept.scale) if later else 1.0


def _keep(x: Tensor, y: Tensor, kept: Kept, steps: Steps, scale: float) -> Tensor:
    """``y``: of ``x``, what is kept, times ``scale``, and zeros; both contiguous, of one dtype, perhaps the same."""
    blocks, units = _Blocks.of("fp", kept, steps, x), x.shape[-1]
    precision = Precision.STRICT if x.dtype == torch.float32 else of_products(x.dtype)
    tiles, row_tiles = -(-units // _KEEP_UNITS), -(-blocks.rows.batch // _KEEP_ROWS)
    launch(
        _unit(precision, 1, y), "keep_units", x, blocks.rows.steps * row_tiles * tiles, THREADS,
        x, *blocks.tensors, y, scale, blocks.kept_stride, kept.width, units, blocks.rows.stride, tiles, row_tiles,
        shared=min(units, _KEEP_UNITS),
    )  # fmt: skip
    return y


def _finished(y: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """``scale · y + bias``, perhaps in place of ``y``."""
    if bias is not None:
        return torch.add(bias, y, alpha=scale)
    return y if scale == 1.0 else y.mul_(scale)


def _check(name: str, tensor: Tensor, precision: Precision | None = None) -> None:
    """
    Raises:
        TypeError: ``tensor`` is not of the precision's dtype (one of any precision), or on another kind of device.
    """
    if precision is not None and tensor.dtype != precision.dtype:
        raise TypeError(f"{name} must be {precision.dtype}, got {tensor.dtype}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device.type != driver().device_type:
        raise TypeError(f"{name} must be on a {driver().device_type} device, got {tensor.device}")
