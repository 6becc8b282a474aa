"""The three sparse products on packed weights: one call of the library each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..steps import Steps
from .library import adjacent, c_kept, c_rows, c_steps, function, padded_rows, panel_width, pointer
from .memory import empty

if TYPE_CHECKING:
    from torch import Tensor

    from ..kept import Kept

#: Rows that a dense product takes as one block: few enough for their transposed copy to stay in the caches.
BLOCK_ROWS = 64


class PackedMatrix(NamedTuple):
    """A weight ``[K, N]`` as panels ``[ceil(N / width), padded K, width]``."""

    panels: Tensor
    units: int
    columns: int


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the library computes in: float32 for the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_panels(weight: Tensor, gates: bool, units_first: bool) -> Tensor:
    """Panels of a matrix whose columns are adjacent: ``[N, K]``, or ``[K, N]`` with ``units_first``."""
    width = panel_width(weight.dtype)
    columns, units = weight.shape if not units_first else weight.shape[::-1]
    columns_of_panel = width // 4 if gates else width
    count = ((columns // 4 if gates else columns) + columns_of_panel - 1) // columns_of_panel
    panels = empty(count, padded_rows(units, weight.dtype), width, dtype=weight.dtype)
    function("sd_pack", weight.dtype)(
        torch.get_num_threads(), pointer(weight), weight.stride(0), units_first, units, columns, gates,
        pointer(panels),
    )  # fmt: skip
    return panels


def gemm_pack(weight_t: Tensor) -> PackedMatrix:
    """Pack ``[K, N]``; a transposed view of a contiguous ``[N, K]`` is read where it lies."""
    weight_t = weight_t.to(opmath(weight_t.dtype))
    units, columns = weight_t.shape
    if weight_t.stride(0) == 1 or units <= 1:
        return PackedMatrix(pack_panels(adjacent(weight_t.t()), False, False), units, columns)
    return PackedMatrix(pack_panels(adjacent(weight_t), False, True), units, columns)


def _layout(steps: Steps, kept: Kept | None, *activations: Tensor) -> tuple[Steps, Kept | None, list[Tensor]]:
    """The same rows as blocks of convenient size where every row is multiplied alike, else as they are."""
    locked = kept is not None and kept.steps > 0 and (kept.steps == 1 or kept.indices.stride(0) == 0)
    if kept is not None and not locked:
        return steps, kept, [adjacent(x) for x in activations]
    flat = [x.flatten(0, -2).contiguous() for x in activations]
    rows = flat[0].shape[0]
    sizes = [BLOCK_ROWS] * (rows // BLOCK_ROWS) + ([rows % BLOCK_ROWS] if rows % BLOCK_ROWS else [])
    if kept is not None:
        kept = type(kept)(kept.indices[:1].expand(len(sizes), -1), kept.size, kept.scale, kept.padded)
    return Steps.packed(sizes), kept, flat


def gemm_fp(x: Tensor, weight: PackedMatrix, kept: Kept | None, steps: Steps, bias: Tensor | None) -> Tensor:
    """``y_t = scale · x_t[:, kept_t] @ weight[kept_t, :] + bias``."""
    dtype, shape = x.dtype, x.shape
    math = opmath(dtype)
    steps, kept, (x,) = _layout(steps, kept, x.to(math))
    y = empty(*shape[:-1], weight.columns, dtype=math)
    bias = None if bias is None else bias.to(math).contiguous()
    units, alive = c_kept(kept, weight.units)
    function("sd_gemm_fp", math)(
        torch.get_num_threads(), c_steps(x, steps), c_rows(x, steps), pointer(weight.panels), weight.columns,
        pointer(bias), units, c_rows(y.view(*x.shape[:-1], weight.columns), steps),
    )  # fmt: skip
    del alive
    return y.to(dtype)


def gemm_bp(dy: Tensor, weight: PackedMatrix, kept: Kept | None, steps: Steps) -> Tensor:
    """``dx_t[:, kept_t] = scale · dy_t @ weight[kept_t, :].T``."""
    dtype, shape = dy.dtype, dy.shape
    math = opmath(dtype)
    steps, kept, (dy,) = _layout(steps, kept, dy.to(math))
    dx = empty(*shape[:-1], weight.units, dtype=math)
    units, alive = c_kept(kept, weight.units)
    function("sd_gemm_bp", math)(
        torch.get_num_threads(), c_steps(dy, steps), c_rows(dy, steps), pointer(weight.panels), weight.columns,
        units, c_rows(dx.view(*dy.shape[:-1], weight.units), steps),
    )  # fmt: skip
    del alive
    return dx.to(dtype)


def gemm_wg(x: Tensor, dy: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
    """``dweight[kept_t, :] += scale · x_t[:, kept_t].T @ dy_t``; a transposed view of a contiguous ``[N, K]``."""
    dtype = x.dtype
    math = opmath(dtype)
    steps, kept, (x, dy) = _layout(steps, kept, x.to(math), dy.to(math))
    dweight = empty(dy.shape[-1], x.shape[-1], dtype=math)
    units, alive = c_kept(kept, x.shape[-1])
    function("sd_gemm_wg", math)(
        torch.get_num_threads(), c_steps(x, steps), c_rows(x, steps), c_rows(dy, steps), dy.shape[-1], units,
        pointer(dweight),
    )  # fmt: skip
    del alive
    return dweight.t().to(dtype)
