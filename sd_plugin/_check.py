"""``SD_PLUGIN_CHECK=1``: what hints say is compared with the data at every use, forward and backward.

It finds what torch tells nobody: writes into a dropped tensor through numpy, DLPack, ``.data`` or its storage, values
that are not finite where units were dropped, and kept units out of order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ._environment import CHECK_VARIABLE, read_check
from .kernels import has_memory

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels import Kept, Steps


def _is_asked_for() -> bool:
    try:
        return read_check(os.environ)
    except ValueError as error:
        # Whoever sets it to something wants a check.
        warnings.warn(f"sd-plugin: {error}; it is on", stacklevel=2)
        return True


#: Read once: a program that does not check pays for a look at this name.
ENABLED = _is_asked_for()


class CheckError(RuntimeError):
    """A hint does not hold for the data; the message names the site."""


class Dropped(Protocol):
    """Columns that one dropout zeroed; :class:`sd_plugin.hints.Part` is one."""

    @property
    def kept(self) -> Kept: ...
    @property
    def sites(self) -> list[str]: ...


def check_zeros(tensor: Tensor, parts: Sequence[Dropped], steps: Steps, when: str) -> None:
    """Every dropped unit of ``tensor``, whose rows are laid out as ``steps`` says, is zero.

    Args:
        parts: side by side along the columns; when: said in the message.

    Raises:
        CheckError: one is not.
    """
    if not has_memory(tensor):
        return
    first = 0
    for part in parts:
        columns = tensor.detach()[..., first : first + part.kept.size]
        first += part.kept.size
        wrong = columns[(columns != 0) & ~steps.spread(part.kept.mask())]
        if not wrong.numel():
            continue
        value, told = float(wrong[0]), ", ".join(part.sites) or "a hint made by hand"
        if not torch.isfinite(wrong).all():
            raise CheckError(
                f"{CHECK_VARIABLE}: {told}: {wrong.numel()} values of dropped units are nan or infinite {when}: the "
                "products that skip them leave them out, where a dense product would give nan"
            )
        raise CheckError(
            f"{CHECK_VARIABLE}: {told}: {wrong.numel()} values of dropped units are not zero {when} ({value:g} is "
            "one): the tensor was written to in a way that torch does not count (numpy(), np.asarray, DLPack, .data, "
            "its storage); write with torch's operations, or into a copy"
        )


def check_order(kept: Kept, site: str) -> None:
    """Kept units ascend at every step.

    Raises:
        CheckError: they do not.
    """
    if not has_memory(kept.indices):
        return
    indices = kept.indices
    ascend = indices[:, 1:] > indices[:, :-1]
    if kept.padded:
        ascend |= indices[:, 1:] == kept.size
    if not ascend.all() or bool((indices < 0).any()) or bool((indices > kept.size - (not kept.padded)).any()):
        raise CheckError(f"{CHECK_VARIABLE}: {site}: kept units of a step do not ascend from 0 to {kept.size - 1}")
