"""Hints: a note on a tensor about which of its columns are zero, for the product that comes next.

A structured dropout returns an ordinary dense tensor; the hint is an attribute on it. It is an optimisation, never
a meaning: without it the product is dense and the result the same. It is found again through ``tensor._base`` after
a ``view`` that keeps the rows in order, and not trusted once the tensor was modified in place (``_version``) or given
other memory.

Two things torch does not tell: a write through ``tensor.data`` (``x.data.mul_(2)``), after which the hint still counts;
and that ``torch.autograd.grad`` asks for the gradient of the dropped tensor itself, which is zero in skipped columns.
(A leaf that requires a gradient, and a tensor whose gradient is retained, are multiplied densely.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import stats
from .kernels import Kept, Steps

if TYPE_CHECKING:
    from torch import Tensor

_ATTRIBUTE = "_sd_hint"


class Draw:
    """One drawn pattern: counted once when drawn, and once when the first product uses it."""

    __slots__ = ("_open", "site")

    def __init__(self, site: str, kept: Kept) -> None:
        self.site = site
        self._open = True
        stats.count_draw(site, kept)

    def use(self) -> None:
        """A product visits its kept units only."""
        if self._open:
            self._open = False
            stats.count_use(self.site)

    def waive(self) -> None:
        """No product with a weight follows this dropout, so there is nothing to skip and nothing lost."""
        if self._open:
            self._open = False
            stats.count_waived(self.site)


class Part:
    """The columns of a tensor that one dropout zeroed.

    Attributes:
        kept: kept units, unscaled: the tensor carries the scale.
        draws: where they were drawn; empty for columns that nothing dropped.
    """

    __slots__ = ("draws", "kept")

    def __init__(self, kept: Kept, draws: Sequence[Draw] = ()) -> None:
        self.kept = kept.unscaled()
        self.draws = tuple(draws)


class Hint:
    """Which columns of a tensor are not zero, per time step.

    Attributes:
        parts: what each dropout zeroed, side by side along the columns; mostly one.
        kept: kept units of the whole, unscaled.
        steps: which rows of the tensor, in ``shape``, belong to which time step.
    """

    __slots__ = ("_memory", "_version", "kept", "parts", "shape", "steps")

    def __init__(self, parts: Sequence[Part], steps: Steps, tensor: Tensor) -> None:
        self.parts = tuple(parts)
        self.kept = parts[0].kept if len(parts) == 1 else Kept.concat([part.kept for part in parts])
        self.steps = steps
        self.shape = tensor.shape
        self._version = tensor._version
        self._memory = tensor.data_ptr()

    def holds_for(self, tensor: Tensor) -> bool:
        """``tensor``, which carries this hint or is a view of what carries it, was not modified since."""
        return tensor._version == self._version and tensor.data_ptr() == self._memory

    def speaks_of(self, tensor: Tensor, steps: Steps) -> bool:
        """The time steps of this hint are those of ``tensor``, laid out as ``steps`` says.

        A view may keep the rows in their order and yet give them to other steps.
        """
        return self.steps == steps and self.shape == tensor.shape

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy or a checkpoint of the tensor has no hint, and nothing of this package is needed to load it. Every
        # version of torch's weights-only loader knows this type.
        return OrderedDict, ()

    def use(self) -> Kept:
        """The kept units, for a product."""
        for part in self.parts:
            for draw in part.draws:
                draw.use()
        return self.kept


def attach(tensor: Tensor, parts: Sequence[Part], steps: Steps) -> Tensor:
    """Note on ``tensor``, whose rows are laid out as ``steps`` says, that its other columns are zero; returns it."""
    # Nothing tells when a tensor of inference mode is modified, so no hint on it could be trusted.
    if not tensor.is_inference():
        setattr(tensor, _ATTRIBUTE, Hint(parts, steps, tensor))
    return tensor


def lookup(tensor: Tensor) -> Hint | None:
    """The hint of ``tensor``, or of the tensor it is a row-preserving view of; None when there is none to trust."""
    hint = getattr(tensor, _ATTRIBUTE, None)
    if isinstance(hint, Hint):
        trusted = tensor.shape == hint.shape and hint.holds_for(tensor) and not _is_differentiated(tensor)
        return hint if trusted else None
    base = tensor._base
    if base is None or _is_differentiated(base) or _is_differentiated(tensor):
        return None
    hint = getattr(base, _ATTRIBUTE, None)
    if not isinstance(hint, Hint) or not hint.holds_for(tensor):
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


def _is_differentiated(tensor: Tensor) -> bool:
    """Somebody reads the gradient of this very tensor, of which skipping computes the kept columns only."""
    return tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad)


def waive(tensor: Tensor) -> Tensor:
    """Tell the counters that no product follows ``tensor``: its pattern is not lost for want of one."""
    hint = lookup(tensor)
    if hint is not None:
        for part in hint.parts:
            for draw in part.draws:
                draw.waive()
    return tensor


def carry(source: Tensor, source_steps: Steps, target: Tensor, steps: Steps) -> Tensor:
    """Give ``target``, the rows of ``source`` in another layout, the hint of ``source``, if it has one.

    Args:
        source: laid out as ``source_steps`` says; target: as ``steps`` says. It may have fewer time steps (packed
            from padded); then the first ones count.

    Returns:
        ``target``.
    """
    hint = lookup(source)
    count = steps.count(target)
    if hint is None or not hint.speaks_of(source, source_steps) or count > hint.kept.steps:
        return target
    return attach(target, [Part(part.kept.first(count), part.draws) for part in hint.parts], steps)


def unbind(x: Tensor, steps: Steps) -> list[Tensor]:
    """The time steps of ``x``, each ``[rows, K]`` with a hint of its own if ``x`` has one for these steps."""
    rows = steps.split(x)
    hint = lookup(x)
    if hint is not None and hint.speaks_of(x, steps):
        for t, row in enumerate(rows):
            attach(row, [Part(p.kept.at(t), p.draws) for p in hint.parts], Steps.packed(row.shape[:1]))
    return rows


def cat(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat(tensors, 1)`` of one-step tensors ``[B, K_i]``: kept are the kept units of each, side by side.

    Returns:
        ``[B, sum of K_i]``; without a hint if no tensor has one.
    """
    joined = torch.cat(list(tensors), 1)
    hints = [lookup(tensor) for tensor in tensors]
    if all(hint is None for hint in hints) or any(hint is not None and hint.kept.steps != 1 for hint in hints):
        return joined
    parts: list[Part] = []
    for tensor, hint in zip(tensors, hints, strict=True):
        whole = Part(Kept.all(1, tensor.shape[1], tensor.device))
        parts.extend([whole] if hint is None else hint.parts)
    return attach(joined, parts, Steps.packed(joined.shape[:1]))


def stack(tensors: Sequence[Tensor], steps: Steps) -> Tensor:
    """``torch.stack`` of one-step tensors ``[B, K]`` along the time dimension of ``steps``, hints likewise.

    Returns:
        ``[T, B, K]`` or ``[B, T, K]``; without a hint unless every tensor has one, of the same number of units.
    """
    stacked = torch.stack(list(tensors), steps.time_dim)
    parts = []
    for tensor in tensors:
        hint = lookup(tensor)
        if hint is None or len(hint.parts) != 1 or hint.kept.steps != 1:
            return stacked
        parts.append(hint.parts[0])
    if len({(part.kept.width, part.kept.padded) for part in parts}) != 1:
        return stacked
    first = parts[0].kept
    kept = Kept(torch.cat([part.kept.indices for part in parts]), first.size, 1.0, first.padded)
    return attach(stacked, [Part(kept, [draw for part in parts for draw in part.draws])], steps)
