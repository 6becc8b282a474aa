"""Which of two ways a call takes: what is expected to be faster, or what an environment variable asks for.

``choices.json`` says up to which kept fraction the kernels that skip dropped units are faster than cuBLAS on operands
with zeros in place of them, and which GPU says so; "estimated" is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..dispatch import BackendError
from .precision import Precision

if TYPE_CHECKING:
    from ..kept import Kept
    from .tiling import Tile

#: ``skip``, ``dense`` or ``auto``: the three products with a structured pattern.
PRODUCTS = "SD_PLUGIN_CUDA_PRODUCTS"
#: ``persistent``, ``steps`` or ``auto``: a layer in one launch, or in launches at every time step.
RECURRENCE = "SD_PLUGIN_CUDA_RECURRENCE"
_VALID = {PRODUCTS: ("skip", "dense"), RECURRENCE: ("persistent", "steps")}

Phase = Literal["fp", "bp", "wg"]


class Table(NamedTuple):
    """What is faster, and how that is known."""

    source: str  #: the GPU it was measured on, or "estimated"
    largest_kept_fraction: dict[tuple[str, Precision], float]


@cache
def table() -> Table:
    """The contents of ``choices.json``."""
    data = json.loads(Path(__file__).with_name("choices.json").read_text(encoding="utf-8"))
    fractions = {
        (phase, Precision[name]): float(fraction)
        for phase, of_phase in data["largest_kept_fraction"].items()
        for name, fraction in of_phase.items()
    }
    return Table(data["source"], fractions)


def skips(phase: Phase, precision: Precision, kept: Kept) -> bool:
    """Whether a product leaves dropped units out, rather than multiplying zeros.

    Raises:
        BackendError: ``SD_PLUGIN_CUDA_PRODUCTS`` has no valid value.
    """
    asked = read(PRODUCTS)
    if asked is not None:
        return asked == "skip"
    return kept.width <= table().largest_kept_fraction[phase, precision] * kept.size


def recurrence(tile: Tile | None) -> Tile | None:
    """The tile of the persistent kernels that a layer uses; None: it goes step by step.

    Args:
        tile: the best there is, or None.

    Raises:
        BackendError: ``SD_PLUGIN_CUDA_RECURRENCE`` has no valid value, or asks for kernels that do not fit.
    """
    asked = read(RECURRENCE)
    if asked == "persistent" and tile is None:
        raise BackendError(f"{RECURRENCE}=persistent: the layer does not fit this GPU")
    return None if asked == "steps" else tile


def read(variable: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The value of one of the two environment variables, None when it is unset, empty or ``auto``.

    Raises:
        BackendError: it is not a valid one.
    """
    value = environ.get(variable, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value not in _VALID[variable]:
        raise BackendError(f"{variable}={value} is not valid; valid: auto, {', '.join(_VALID[variable])}")
    return value
