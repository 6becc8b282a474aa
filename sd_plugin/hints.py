"""Hints: a note on a tensor about which of its columns are zero, for the product that comes next.

A structured dropout returns an ordinary dense tensor; the hint is an attribute on it. It is an optimisation, never
a meaning: without it the product is dense and the result the same. It is found again through ``tensor._base`` after
a ``view`` that keeps the rows in order, and not trusted once the tensor was modified in place (``_version``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import stats
from .kernels import Kept, Steps

if TYPE_CHECKING:
    from torch import Tensor

_ATTRIBUTE = "_sd_hint"


class Hint:
    """Which columns of a tensor are not zero, per time step.

    Attributes:
        parts: (site, kept units) of each tensor laid side by side to make this one; mostly one.
        kept: kept units of the whole, unscaled: the tensor carries the scale.
        steps: which rows of the tensor, in ``shape``, belong to which time step.
    """

    __slots__ = ("_unused", "_version", "kept", "parts", "shape", "steps")

    def __init__(
        self, parts: list[tuple[str, Kept]], steps: Steps, tensor: Tensor, unused: set[str] | None = None
    ) -> None:
        self.parts = [(site, kept.unscaled()) for site, kept in parts]
        self.kept = self.parts[0][1] if len(parts) == 1 else Kept.concat([kept for _, kept in parts])
        self.steps = steps
        self.shape = tensor.shape
        self._version = tensor._version
        # Sites whose pattern no product has used yet; shared by all hints that stem from one draw.
        self._unused = {site for site, _ in parts} if unused is None else unused

    def holds_for(self, tensor: Tensor) -> bool:
        """``tensor``, which carries this hint or is a view of what carries it, was not modified since."""
        return tensor._version == self._version

    def use(self) -> Kept:
        """The kept units, for a product; the first use is counted."""
        while self._unused:
            stats.count_use(self._unused.pop())
        return self.kept

    def moved(self, target: Tensor, steps: Steps) -> Hint:
        """The same pattern for ``target``, whose rows are laid out as ``steps`` says."""
        return Hint(self.parts, steps, target, self._unused)


def attach(tensor: Tensor, site: str, kept: Kept, steps: Steps) -> Tensor:
    """Note on ``tensor`` that only ``kept`` columns are not zero; returns ``tensor``.

    Args:
        tensor: dropped and scaled, rows laid out as ``steps`` says.
        site: name of the place that drew ``kept``, for the report.
    """
    return attach_parts(tensor, [(site, kept)], steps)


def attach_parts(tensor: Tensor, parts: list[tuple[str, Kept]], steps: Steps) -> Tensor:
    """:func:`attach` for a tensor made of several laid side by side along their columns."""
    setattr(tensor, _ATTRIBUTE, Hint(parts, steps, tensor))
    return tensor


def carry(source: Tensor, target: Tensor, steps: Steps) -> Tensor:
    """Give ``target``, the rows of ``source`` in another order or layout, the hint of ``source``, if it has one."""
    hint = lookup(source)
    if hint is not None:
        setattr(target, _ATTRIBUTE, hint.moved(target, steps))
    return target


def lookup(tensor: Tensor) -> Hint | None:
    """The hint of ``tensor``, or of the tensor it is a row-preserving view of; None when there is none to trust."""
    hint: Hint | None = getattr(tensor, _ATTRIBUTE, None)
    if hint is not None:
        return hint if tensor.shape == hint.shape and hint.holds_for(tensor) else None
    base = tensor._base
    if base is None:
        return None
    hint = getattr(base, _ATTRIBUTE, None)
    if hint is None or not hint.holds_for(tensor):
        return None
    same_rows = (
        tensor.dim() > 0
        and tensor.shape[-1] == hint.shape[-1]
        and tensor.numel() == base.numel()
        and tensor.dtype == base.dtype
        and tensor.is_contiguous()
        and base.is_contiguous()
    )
    return hint if same_rows else None
