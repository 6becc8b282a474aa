"""The kept units of a structured dropout: what every sparse product of this package is told to visit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor


# eq=False: tensors have no truth value, and identity is what a comparison of patterns means.
@dataclass(frozen=True, eq=False)
class Kept:
    """Units that survive a structured dropout, per time step (the paper, Fig. 1, Cases III and IV).

    At step ``t`` the same units survive for the whole batch, so a matrix product can skip the rest.

    Attributes:
        indices: ``[T, k]`` int32, ascending in every row. With ``padded``, a row may end in entries equal to
            ``size``, which stand for no unit.
        size: number of units before dropping (the columns of the dropped tensor).
        scale: factor on the surviving units; ``size / k`` for exact sampling, ``1 / (1 - p)`` for Bernoulli.
        padded: rows may hold fewer than ``k`` units (Bernoulli sampling).
        factors: ``[T, size]`` float32, ``scale`` where a unit is kept and zero elsewhere, if it was made already.
    """

    indices: Tensor
    size: int
    scale: float = 1.0
    padded: bool = False
    factors: Tensor | None = None

    def __post_init__(self) -> None:
        if self.indices.dim() != 2:
            raise ValueError(f"kept indices must be [T, k], got shape {tuple(self.indices.shape)}")
        if self.indices.dtype != torch.int32:
            raise TypeError(f"kept indices must be int32, got {self.indices.dtype}")
        if self.indices.shape[1] > self.size:
            raise ValueError(f"kept indices name {self.indices.shape[1]} units of {self.size}")

    @classmethod
    def all(cls, steps: int, size: int, device: torch.device | str | None = None) -> Kept:
        """Every one of ``size`` units kept at each of ``steps`` steps, unscaled."""
        return cls(torch.arange(size, dtype=torch.int32, device=device).expand(steps, size), size)

    @classmethod
    def concat(cls, parts: list[Kept]) -> Kept:
        """Kept units of tensors laid side by side along their columns (the union of disjoint ranges).

        The result is unscaled: the parts may scale differently, so their tensors must carry the scale already.

        Raises:
            ValueError: the parts differ in time steps.
        """
        if len({part.steps for part in parts}) > 1:
            raise ValueError(f"parts differ in time steps: {[part.steps for part in parts]}")
        columns, offset, padded = [], 0, any(part.padded for part in parts)
        total = sum(part.size for part in parts)
        for part in parts:
            shifted = part.indices + offset
            columns.append(torch.where(part.indices < part.size, shifted, total) if part.padded else shifted)
            offset += part.size
        joined = torch.cat(columns, 1)
        return cls(joined.sort(1).values if padded else joined, total, 1.0, padded)

    @classmethod
    def in_time(cls, parts: list[Kept]) -> Kept:
        """Kept units of tensors that follow each other in time.

        Raises:
            ValueError: the parts differ in size or scale.
        """
        if len({(part.size, part.scale) for part in parts}) != 1:
            raise ValueError(f"parts differ in size or scale: {[(part.size, part.scale) for part in parts]}")
        first, width = parts[0], max(part.width for part in parts)
        padded = any(part.padded or part.width < width for part in parts)
        rows = [pad(part.indices, (0, width - part.width), value=part.size) for part in parts]
        return cls(torch.cat(rows), first.size, first.scale, padded)

    @property
    def steps(self) -> int:
        """Number of time steps, ``T``."""
        return self.indices.shape[0]

    @property
    def width(self) -> int:
        """Number of units visited at each step, ``k`` (an upper bound when ``padded``)."""
        return self.indices.shape[1]

    def mask(self) -> Tensor:
        """``[T, size]`` bool, True where a unit is kept."""
        flags = torch.zeros(self.steps, self.size + 1, dtype=torch.bool, device=self.indices.device)
        return flags.scatter_(1, self.indices.long(), True)[:, : self.size]

    def multiplier(self, dtype: torch.dtype) -> Tensor:
        """``[T, size]``: ``scale`` where a unit is kept, zero elsewhere."""
        return self.mask().to(dtype) * self.scale if self.factors is None else self.factors.to(dtype)

    def unscaled(self) -> Kept:
        """The same units for a tensor that carries the scale already."""
        return self if self.scale == 1.0 else replace(self, scale=1.0, factors=None)

    def at(self, step: int) -> Kept:
        """The kept units of one step, as a pattern of ``T = 1``."""
        return self._cut(slice(step, step + 1))

    def first(self, steps: int) -> Kept:
        """The kept units of the first ``steps`` steps."""
        return self._cut(slice(steps))

    def _cut(self, steps: slice) -> Kept:
        factors = None if self.factors is None else self.factors[steps]
        return replace(self, indices=self.indices[steps], factors=factors)
