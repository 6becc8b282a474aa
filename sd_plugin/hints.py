"""Hints: a note on a tensor about which of its columns are zero, for the product that comes next.

A structured dropout returns an ordinary dense tensor; the hint is an attribute on it. It is an optimisation, never
a meaning: without it the product is dense and the result the same. It is found again through ``tensor._base`` after
a ``view`` that keeps the rows in order, and not trusted once the tensor was modified in place (``_version``) or given
other memory.

The gradient of a dropped tensor is whole where somebody reads it (:mod:`._route`): of a leaf, where it is retained,
where the tensor has a hook, behind a full backward hook of a module, and behind more than one view.

What torch does not tell: a write through ``tensor.data``, numpy, DLPack or the storage, after which the hint still
counts (``SD_PLUGIN_CHECK=1`` finds it, :mod:`._check`); and that ``torch.autograd.grad`` asks for the gradient of the
dropped tensor itself, or a hook of its ``grad_fn`` reads it, which is zero in skipped columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import _check, stats
from ._route import Route
from .kernels import Kept, Steps, place

if TYPE_CHECKING:
    from torch import Tensor

_ATTRIBUTE = "_sd_hint"


class Draw:
    """One drawn pattern: counted once when drawn, and once when the first product uses it."""

    __slots__ = ("_used", "_waived", "site")

    def __init__(self, site: str, kept: Kept) -> None:
        self.site = site
        self._used = self._waived = False
        stats.count_draw(site, kept)
        if _check.ENABLED:
            _check.check_order(kept, site)

    def use(self) -> None:
        """A product visits its kept units only; what another one has waived counts as used then."""
        if not self._used:
            stats.count_use(self.site)
            if self._waived:
                stats.count_waived(self.site, -1)
        self._used, self._waived = True, False

    def waive(self) -> None:
        """No product with a weight follows this dropout, or one too small to gain: nothing is lost."""
        if not self._used and not self._waived:
            stats.count_waived(self.site)
            self._waived = True


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

    @property
    def sites(self) -> list[str]:
        """Where they were drawn, each once."""
        return list(dict.fromkeys(draw.site for draw in self.draws))


class Hint:
    """Which columns of a tensor are not zero, per time step.

    Attributes:
        parts: what each dropout zeroed, side by side along the columns; mostly one.
        kept: kept units of the whole, unscaled.
        steps: which rows of the tensor, in ``shape``, belong to which time step.
        routes: the ways of its gradient to the dropouts, if the tensor was made of other dropped tensors.
        vouched: see :func:`vouch`.
    """

    __slots__ = ("_memory", "_version", "kept", "parts", "routes", "shape", "steps", "vouched")

    def __init__(self, parts: Sequence[Part], steps: Steps, tensor: Tensor, routes: Sequence[Route] = ()) -> None:
        self.parts = tuple(parts)
        self.routes = routes
        self.vouched = False
        self.kept = parts[0].kept if len(parts) == 1 else Kept.concat([part.kept for part in parts])
        self.steps = steps
        self.shape = tensor.shape
        self._version = tensor._version
        self._memory = place(tensor)

    def holds_for(self, tensor: Tensor) -> bool:
        """``tensor``, which carries this hint or is a view of what carries it, was not modified since."""
        return tensor._version == self._version and place(tensor) == self._memory

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


def attach(tensor: Tensor, parts: Sequence[Part], steps: Steps, routes: Sequence[Route] = ()) -> Tensor:
    """Note on ``tensor``, whose rows are laid out as ``steps`` says, that its other columns are zero; returns it.

    Args:
        routes: of the tensors that it was made of (:func:`route`), when not by a dropout itself.

    Raises:
        CheckError: they are not, and ``SD_PLUGIN_CHECK=1`` asked to look.
    """
    if _check.ENABLED:
        _check.check_zeros(tensor, parts, steps, "after the dropout")
    # Nothing tells when a tensor of inference mode is modified, so no hint on it could be trusted.
    if not tensor.is_inference():
        setattr(tensor, _ATTRIBUTE, Hint(parts, steps, tensor, routes))
    return tensor


def lookup(tensor: Tensor) -> Hint | None:
    """The hint of ``tensor``, or of the tensor it is a row-preserving view of; None when there is none to trust."""
    hint = getattr(tensor, _ATTRIBUTE, None)
    if isinstance(hint, Hint):
        return hint if tensor.shape == hint.shape and hint.holds_for(tensor) else None
    base = tensor._base
    if base is None:
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


def route(tensor: Tensor, hint: Hint) -> Route | None:
    """The way of the gradient of ``tensor`` to the dropouts that ``hint``, which was looked up for it, speaks of.

    Returns:
        None if there is no gradient.
    """
    if not tensor.requires_grad:
        return None
    base = tensor._base
    dropped = tensor if base is None or hasattr(tensor, _ATTRIBUTE) else base
    return Route(tensor, dropped, hint.routes, hint.vouched)


def vouch(tensor: Tensor) -> Tensor:
    """Say that what ``tensor`` goes through before its product is known, and hooks no view of a view of it.

    For code of a host that slices and views it: torch does not show the tensors in between, so that the input
    gradient of the product would be dense for their sake. Hooks of ``tensor`` itself and of the operand are still seen.

    Returns:
        ``tensor``.
    """
    hint = getattr(tensor, _ATTRIBUTE, None)
    if isinstance(hint, Hint):
        hint.vouched = True
    return tensor


def _routes(tensor: Tensor, hint: Hint) -> list[Route]:
    found = route(tensor, hint)
    return [] if found is None else [found]


def waive(tensor: Tensor) -> Tensor:
    """Tell the counters that no product of ``tensor`` is to skip: its pattern is not lost for want of one."""
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
    parts = [Part(part.kept.first(count), part.draws) for part in hint.parts]
    return attach(target, parts, steps, _routes(source, hint))


def unbind(x: Tensor, steps: Steps) -> list[Tensor]:
    """The time steps of ``x``, each ``[rows, K]`` with a hint of its own if ``x`` has one for these steps."""
    rows = steps.split(x)
    hint = lookup(x)
    if hint is not None and hint.speaks_of(x, steps):
        routes = _routes(x, hint)
        for t, row in enumerate(rows):
            attach(row, [Part(p.kept.at(t), p.draws) for p in hint.parts], Steps.packed(row.shape[:1]), routes)
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
    routes: list[Route] = []
    for tensor, hint in zip(tensors, hints, strict=True):
        if hint is None:
            parts.append(Part(Kept.all(1, tensor.shape[1], tensor.device)))
        else:
            parts.extend(hint.parts)
            routes += _routes(tensor, hint)
    return attach(joined, parts, Steps.packed(joined.shape[:1]), routes)


def stack(tensors: Sequence[Tensor], steps: Steps) -> Tensor:
    """``torch.stack`` of one-step tensors ``[B, K]`` along the time dimension of ``steps``, hints likewise.

    Returns:
        ``[T, B, K]`` or ``[B, T, K]``; without a hint unless every tensor has one, of the same number of units.
    """
    stacked = torch.stack(list(tensors), steps.time_dim)
    parts: list[Part] = []
    routes: list[Route] = []
    for tensor in tensors:
        hint = lookup(tensor)
        if hint is None or len(hint.parts) != 1 or hint.kept.steps != 1:
            return stacked
        parts.append(hint.parts[0])
        routes += _routes(tensor, hint)
    if len({(part.kept.width, part.kept.padded) for part in parts}) != 1:
        return stacked
    kept = Kept.in_time([part.kept for part in parts])
    return attach(stacked, [Part(kept, [draw for part in parts for draw in part.draws])], steps, routes)
