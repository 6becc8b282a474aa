"""Dropout patterns: the four cases of the paper's Fig. 1, drawn on the tensor's device without host synchronisation.

| case | in the batch (space) | over time | known as |
|---|---|---|---|
| I   | random     | varying | Zaremba et al. 2014 |
| II  | random     | locked  | Gal & Ghahramani 2016, AWD-LSTM |
| III | structured | varying | the paper: "structured in space, randomized in time" |
| IV  | structured | locked  | |

Structured cases give :class:`~sd_plugin.kernels.Kept` units, which products can skip; random ones a multiplier.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, SupportsFloat

import torch

from . import kernels
from .kernels import Kept

if TYPE_CHECKING:
    from torch import Tensor

#: How the number of structured kept units is chosen: always ``round((1 - p) · H)``, or each unit on its own.
SAMPLINGS = ("exact", "bernoulli")


class Case(str, Enum):
    """A case of the paper's Fig. 1."""

    I = "I"  # noqa: E741 - the paper's own name
    II = "II"
    III = "III"
    IV = "IV"

    @property
    def structured(self) -> bool:
        """The same units are dropped for the whole batch."""
        return self in (Case.III, Case.IV)

    @property
    def locked(self) -> bool:
        """The same units are dropped at every time step."""
        return self in (Case.II, Case.IV)

    @classmethod
    def of(cls, structured: bool, locked: bool) -> Case:
        """The case with these two properties."""
        return (cls.IV if locked else cls.III) if structured else (cls.II if locked else cls.I)


def check_probability(p: object, name: str = "p") -> float:
    """``p`` as a float; ValueError unless it is in [0, 1)."""
    # Text is no number, though float() would read one out of it.
    # (Of a float that need not be asked, which takes longer than drawing a pattern.)
    if not isinstance(p, (float, int, SupportsFloat)):
        raise ValueError(f"{name} must be a number in [0, 1), got {p!r}")
    value = float(p)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return value


def check_sampling(sampling: str) -> str:
    """``sampling`` itself; ValueError unless it is one of :data:`SAMPLINGS`."""
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    return sampling


def kept_count(size: int, p: float) -> int:
    """Units that exact sampling keeps of ``size``: ``round((1 - p) · size)``, at least one of a non-empty layer."""
    return min(size, max(1, round((1.0 - p) * size)))


def draw_kept(
    steps: int,
    size: int,
    p: float,
    *,
    locked: bool = False,
    sampling: str = "exact",
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Kept:
    """Draw a structured dropout (Case III, or IV when ``locked``).

    Args:
        steps: number of time steps ``T``; size: number of units ``H``.
        p: probability that a unit is dropped, in [0, 1).
        sampling: ``exact`` keeps ``k = round((1 - p) · H)`` units (at least one) at every step and scales by
            ``H / k``; ``bernoulli`` drops each unit on its own and scales by ``1 / (1 - p)``.
        generator: torch's default one for ``device`` when None, so ``torch.manual_seed`` reproduces the draw.

    Returns:
        Kept units ``[T, k]``. Bernoulli rows are padded; ``k`` is then ``H``, or the longest row on a CPU.

    Raises:
        ValueError: ``p`` or ``sampling`` is out of range.
    """
    p = check_probability(p)
    check_sampling(sampling)
    if p == 0.0 or size == 0:
        return Kept.all(steps, size, device)
    noise = torch.rand(min(steps, 1) if locked else steps, size, device=device, generator=generator)
    count = kept_count(size, p) if sampling == "exact" else None
    scale = 1.0 / (1.0 - p) if count is None else size / count
    indices, factors = kernels.kept_lists(noise, count, p, scale)
    factors = None if factors is None else factors.expand(steps, -1)
    return Kept(indices.expand(steps, -1), size, scale, padded=count is None, factors=factors)


def draw_mask(
    steps: int,
    batch: int,
    size: int,
    p: float,
    *,
    locked: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a random dropout (Case I, or II when ``locked``) as a multiplier.

    Returns:
        ``[T, B, H]``: ``1 / (1 - p)`` where a unit is kept, zero elsewhere.

    Raises:
        ValueError: ``p`` is not in [0, 1).
    """
    p = check_probability(p)
    shape = (min(steps, 1) if locked else steps, batch, size)
    keep = torch.rand(shape, device=device, generator=generator) >= p
    return (keep.to(dtype) / (1.0 - p)).expand(steps, batch, size)


def draw(
    case: Case | str,
    steps: int,
    batch: int,
    size: int,
    p: float,
    *,
    sampling: str = "exact",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Kept | Tensor | None:
    """Draw any case of Fig. 1 for ``[T, B, H]`` activations: kept units, a multiplier, or None when ``p`` is 0."""
    case = Case(case)
    if check_probability(p) == 0.0:
        return None
    if case.structured:
        return draw_kept(steps, size, p, locked=case.locked, sampling=sampling, device=device)
    return draw_mask(steps, batch, size, p, locked=case.locked, device=device, dtype=dtype)
