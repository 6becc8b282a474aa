"""Hypothesis strategies for the kernels' operands: time layouts, kept units, tensors of any strides."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin.kernels import Kept, Steps
from sd_plugin.kernels.cuda.precision import Precision

from ..tolerances import TF32

#: Environment variable: the share of its examples that a test takes, where each of them costs more than otherwise.
SHARE = "SD_PLUGIN_TEST_SHARE"


def examples(count: int) -> int:
    """``count``, or the share of it that is asked for."""
    return max(1, round(count * float(os.environ.get(SHARE, "1"))))


@dataclass(frozen=True)
class Layout:
    """A time layout: what the library is told, and the step of each row, found independently of it."""

    steps: Steps
    count: int
    lengths: tuple[int, ...]  #: of each sequence of the batch
    step_of_row: Tensor  #: in the shape of the activations' rows

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def rows(self, size: int) -> tuple[int, ...]:
        """Shape of activations with ``size`` columns."""
        return (*self.step_of_row.shape, size)

    def from_padded(self, padded: Tensor) -> Tensor:
        """``[T, B, K]`` laid out like this."""
        if self.steps.batch_sizes is None:
            return padded.transpose(0, 1) if self.steps.time_dim else padded
        rows = [padded[t, :n] for t, n in enumerate(self.steps.batch_sizes)]
        return torch.cat(rows) if rows else padded.flatten(0, 1)


@st.composite
def layouts(draw: st.DrawFn, max_steps: int = 5, max_batch: int = 4) -> Layout:
    """Time-major, batch-first or packed, with no steps or no rows now and then."""
    kind = draw(st.sampled_from(["time-major", "batch-first", "packed"]))
    if kind == "packed":
        lengths = sorted(draw(st.lists(st.integers(1, max_steps), max_size=max_batch)), reverse=True)
        count = max(lengths, default=0)
        sizes = [sum(length > t for length in lengths) for t in range(count)]
        of_row = [t for t, n in enumerate(sizes) for _ in range(n)]
        return Layout(Steps.packed(sizes), count, tuple(lengths), torch.tensor(of_row, dtype=torch.long))
    count, batch = draw(st.integers(0, max_steps)), draw(st.integers(0, max_batch))
    of_row = torch.arange(count).unsqueeze(1).expand(count, batch)
    time_dim = int(kind == "batch-first")
    return Layout(Steps(time_dim), count, (count,) * batch, of_row.t() if time_dim else of_row)


@st.composite
def kept_units(draw: st.DrawFn, steps: int, size: int) -> Kept | None:
    """None, or kept units of a fixed number, of any number (padded), locked over time, or all of them."""
    kind = draw(st.sampled_from(["none", "exact", "padded", "locked", "all"]))
    if kind == "none":
        return None
    if kind == "all":
        return Kept.all(steps, size)
    noise = noise_of(draw(st.integers(0, 10**6)), steps, size)
    if kind == "padded":
        # From no unit at all to every one in a row; rows are filled up with `size`.
        keep = noise < draw(st.floats(0, 1))
        columns = torch.where(keep, torch.arange(size), size).sort(1).values.int()
        longest = max([1, *keep.sum(1).tolist()])
        return Kept(columns[:, : draw(st.sampled_from([longest, size]))], size, 1.75, padded=True)
    k = draw(st.integers(0, size))
    if kind == "locked":
        noise = noise[:1].expand(steps, size)
    indices = noise.argsort(1)[:, :k].sort(1).values.int()
    if kind == "locked" and steps:
        indices = indices[:1].expand(steps, k)
    return Kept(indices, size, size / max(k, 1))


def noise_of(seed: int, *shape: int) -> Tensor:
    """Uniform float64 noise of its own generator."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensor_of(seed: int, *shape: int) -> Tensor:
    """Normal float64 values of their own generator."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values in memory of another layout."""
    if kind == "gaps":
        room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        room[..., 1::2] = tensor
        return room[..., 1::2]
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


STRIDES = st.sampled_from(["contiguous", "gaps", "transposed"])


def rounded(precision: Precision) -> float:
    """Relative error to which the operands of a product in ``precision`` are rounded."""
    return TF32 if precision is Precision.TF32 else 0.0


def to_device(kept: Kept | None, device: str) -> Kept | None:
    """``kept`` with its indices on ``device``, expanded ones still expanded."""
    if kept is None or device == "cpu":
        return kept
    return Kept(kept.indices.to(device), kept.size, kept.scale, kept.padded)
