"""How the rows of an activation belong to time steps: a time dimension, or a packed sequence's batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """The time layout of activations that all have the same rows and any number of columns.

    Attributes:
        time_dim: 0 for ``[T, B, K]``, 1 for ``[B, T, K]``; ignored when ``batch_sizes`` is given.
        batch_sizes: for packed data ``[R, K]`` (``torch.nn.utils.rnn.PackedSequence``): the number of rows of
            each step, never increasing, ``R`` in sum. None for a tensor with a time dimension.
    """

    time_dim: int = 0
    batch_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.time_dim not in (0, 1):
            raise ValueError(f"time_dim must be 0 or 1, got {self.time_dim}")
        sizes = self.batch_sizes
        if sizes is not None and any(a < b for a, b in pairwise(sizes)):
            raise ValueError("batch_sizes must not increase from step to step")

    @classmethod
    def packed(cls, batch_sizes: Sequence[int]) -> Steps:
        """The layout of a packed sequence with these rows per step."""
        return cls(0, tuple(int(n) for n in batch_sizes))

    @property
    def dims(self) -> int:
        """Number of dimensions of an activation in this layout."""
        return 3 if self.batch_sizes is None else 2

    def count(self, x: Tensor) -> int:
        """Number of time steps, ``T``, of activation ``x``."""
        return x.shape[self.time_dim] if self.batch_sizes is None else len(self.batch_sizes)

    def batch(self, x: Tensor) -> int:
        """Largest number of rows at any step, ``B``, of activation ``x``."""
        if self.batch_sizes is None:
            return x.shape[1 - self.time_dim]
        return self.batch_sizes[0] if self.batch_sizes else 0

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of ``x``, one per time step, each ``[rows at that step, K]``."""
        if self.batch_sizes is None:
            return list(x.unbind(self.time_dim))
        ends = list(accumulate(self.batch_sizes))
        return [x[end - n : end] for end, n in zip(ends, self.batch_sizes, strict=True)]

    def spread(self, per_step: Tensor) -> Tensor:
        """``[T, K]`` values of each step, shaped to broadcast over (or match) an activation of this layout."""
        if self.batch_sizes is None:
            return per_step.unsqueeze(1 - self.time_dim)
        # Not repeat_interleave: its counts would have to be copied to the device first.
        rows = [per_step[t : t + 1].expand(n, -1) for t, n in enumerate(self.batch_sizes)]
        return torch.cat(rows) if rows else per_step

    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has this layout's dimensions and rows; ``name`` is told to the caller."""
        if x.dim() != self.dims:
            kind = ("[T, B, K]", "[B, T, K]")[self.time_dim] if self.batch_sizes is None else "packed [R, K]"
            raise ValueError(f"{name} must be {kind}, got shape {tuple(x.shape)}")
        if self.batch_sizes is not None and x.shape[0] != sum(self.batch_sizes):
            raise ValueError(f"{name} has {x.shape[0]} rows, batch_sizes sum to {sum(self.batch_sizes)}")


TIME_MAJOR = Steps(0)
