"""The three sparse products, one time step at a time: the definition that every backend is held to.

Each gathers the kept rows of the K-major weight and multiplies only those (the paper, section 3.2, Fig. 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..contract import Pattern
    from ..kept import Kept
    from ..steps import Steps


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are accumulated in: float32 for the half types, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class StepPattern:
    """One step's operand of a product: which columns of it count, and the factor on them."""

    def __init__(self, pattern: Pattern, step: int) -> None:
        self.index: Tensor | None = None
        self.valid: Tensor | None = None
        self.mask: Tensor | None = None
        self.scale = 1.0
        if pattern is None:
            return
        if isinstance(pattern, torch.Tensor):
            self.mask = pattern[step]
            return
        self.index, self.scale = pattern.indices[step], pattern.scale
        if pattern.padded:
            # Padding points at no unit: read a real row in its place, and put zero for what comes of it
            # (zero times that row would not do, should it hold an inf or nan).
            self.valid = self.index < pattern.size
            self.index = self.index.clamp(max=pattern.size - 1)

    def take(self, x: Tensor) -> Tensor:
        """The counted columns of ``x`` ``[rows, K]``, scaled."""
        if self.mask is not None:
            return x * self.mask[: x.shape[0]].to(x.dtype)
        if self.index is None:
            return x
        x = x.index_select(1, self.index)
        if self.valid is not None:
            x = x.masked_fill(~self.valid, 0)
        return x if self.scale == 1.0 else x * self.scale

    def rows(self, weight_t: Tensor) -> Tensor:
        """The counted rows of ``weight_t`` ``[K, N]``."""
        if self.index is None:
            return weight_t
        rows = weight_t.index_select(0, self.index)
        return rows if self.valid is None else rows.masked_fill(~self.valid.unsqueeze(1), 0)

    def put(self, dx: Tensor, counted: Tensor) -> None:
        """Add the gradient of the counted columns, ``counted``, into ``dx`` ``[rows, K]``."""
        if self.index is None:
            dx.add_(counted if self.mask is None else counted * self.mask[: dx.shape[0]].to(dx.dtype))
            return
        counted = counted if self.scale == 1.0 else counted * self.scale
        dx.index_add_(1, self.index, counted if self.valid is None else counted.masked_fill(~self.valid, 0))

    def put_rows(self, dweight_t: Tensor, counted: Tensor) -> None:
        """Add the gradient of the counted rows, ``counted``, into ``dweight_t`` ``[K, N]``."""
        if self.index is None:
            dweight_t.add_(counted)
            return
        if self.valid is not None:
            counted = counted.masked_fill(~self.valid.unsqueeze(1), 0)
        dweight_t.index_add_(0, self.index, counted)


def gemm_pack(weight_t: Tensor) -> Tensor:
    """``[K, N]`` K-major in memory, so that a dropped unit is one skipped row, in the dtype of the sums."""
    return weight_t.to(opmath(weight_t.dtype)).contiguous().clone()


def gemm_fp(x: Tensor, weight_t: Tensor, kept: Kept | None, steps: Steps, bias: Tensor | None = None) -> Tensor:
    """``y_t = scale · x_t[:, kept_t] @ weight_t[kept_t, :] + bias``; see :func:`sd_plugin.kernels.gemm_fp`."""
    math = opmath(x.dtype)
    if bias is not None:
        return (gemm_fp(x.to(math), weight_t, kept, steps) + bias.to(math)).to(x.dtype)
    if kept is None:
        return (x.to(math) @ weight_t).to(x.dtype)
    y = x.new_empty(*x.shape[:-1], weight_t.shape[1])
    for t, (x_t, y_t) in enumerate(zip(steps.split(x), steps.split(y), strict=True)):
        pattern = StepPattern(kept, t)
        y_t.copy_(pattern.take(x_t.to(math)) @ pattern.rows(weight_t))
    return y


def gemm_bp(dy: Tensor, weight_t: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
    """``dx_t[:, kept_t] = scale · dy_t @ weight_t[kept_t, :].T``; see :func:`sd_plugin.kernels.gemm_bp`."""
    math = opmath(dy.dtype)
    if kept is None:
        return (dy.to(math) @ weight_t.t()).to(dy.dtype)
    dx = dy.new_zeros(*dy.shape[:-1], weight_t.shape[0], dtype=math)
    for t, (dy_t, dx_t) in enumerate(zip(steps.split(dy), steps.split(dx), strict=True)):
        pattern = StepPattern(kept, t)
        pattern.put(dx_t, dy_t.to(math) @ pattern.rows(weight_t).t())
    return dx.to(dy.dtype)


def gemm_wg(x: Tensor, dy: Tensor, kept: Kept | None, steps: Steps) -> Tensor:
    """``dweight_t[kept_t, :] += scale · x_t[:, kept_t].T @ dy_t``; see :func:`sd_plugin.kernels.gemm_wg`."""
    math = opmath(x.dtype)
    if kept is None:
        return (x.to(math).flatten(0, -2).t() @ dy.to(math).flatten(0, -2)).to(x.dtype)
    dweight_t = x.new_zeros(x.shape[-1], dy.shape[-1], dtype=math)
    for t, (x_t, dy_t) in enumerate(zip(steps.split(x), steps.split(dy), strict=True)):
        pattern = StepPattern(kept, t)
        pattern.put_rows(dweight_t, pattern.take(x_t.to(math)).t() @ dy_t.to(math))
    return dweight_t.to(x.dtype)
