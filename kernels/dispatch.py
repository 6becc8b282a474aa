"""Chooses the backend of each call from the operands' device and dtype and from what is available here.

``SD_PLUGIN_BACKEND`` forces one; a forced backend that cannot run is an error, never a silent fallback. A backend
that would have been preferred but cannot do a call is counted in :data:`fallbacks`. One that is made for the operands'
device but cannot run on this machine is warned about, once: everything would be slow and nobody would know why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from .storage import has_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .contract import Backend

VARIABLE = "SD_PLUGIN_BACKEND"
#: Backends by preference, with the device types each is made for (None: every device).
BACKENDS: dict[str, str | None] = {"cuda": "cuda", "cpu": "cpu", "reference": None}
#: (operation, backend passed over, reason) -> number of calls that went to a slower backend instead.
fallbacks: Counter[tuple[str, str, str]] = Counter()
_NOT_INCLUDED = "this version of sd-plugin does not include it"


class BackendError(RuntimeError):
    """A backend was asked for by name and does not exist or cannot run."""


@cache
def _load(name: str) -> tuple[Backend | None, str | None]:
    """The backend, or why there is none. Asked once per process: the answer cannot change."""
    package = f"{__package__}.{name}"
    spec = importlib.util.find_spec(package)
    # A folder without an __init__.py is what another version leaves behind, __pycache__ mostly.
    if spec is None or (spec.origin is None and spec.submodule_search_locations is not None):
        return None, _NOT_INCLUDED
    try:
        backend: Backend = importlib.import_module(package).BACKEND
    except (ImportError, OSError) as error:
        return None, f"it failed to import ({error})"
    reason = backend.reason_unavailable()
    return (None, reason) if reason else (backend, None)


@cache
def _warn_unavailable(name: str, reason: str) -> None:
    """Says that everything a backend is made for goes to a slower one. Cached: once per process."""
    warnings.warn(
        f"sd-plugin: the {name} backend cannot run, so the slower reference backend is used: {reason}. "
        f"Or set {VARIABLE}=reference to say so yourself",
        RuntimeWarning,
        stacklevel=3,
    )


def status() -> dict[str, str | None]:
    """Every backend by preference, with why it is unavailable (None: available)."""
    return {name: _load(name)[1] for name in BACKENDS}


def forced(environ: Mapping[str, str] = os.environ) -> str | None:
    """The backend that ``SD_PLUGIN_BACKEND`` names, None when it is unset, empty or ``auto``.

    Raises:
        BackendError: it names no backend.
    """
    name = environ.get(VARIABLE, "").strip().lower()
    if name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise BackendError(f"{VARIABLE}={name} is no backend; valid: auto, {', '.join(BACKENDS)}")
    return name


def choose(operation: str, device: torch.device, dtype: torch.dtype, counted: bool = True) -> Backend:
    """The backend for ``operation`` on operands of this device and dtype.

    Args:
        counted: a preferred backend that is passed over counts as a fallback, or is warned about; False only to ask.

    Raises:
        BackendError: the backend forced by ``SD_PLUGIN_BACKEND`` is unknown, unavailable or cannot do it.
    """
    name = forced()
    if name is not None:
        backend, reason = _load(name)
        made_for = BACKENDS[name]
        if backend is not None and made_for not in (None, device.type):
            reason = f"it runs on {made_for} tensors, got {device.type}"
        elif backend is not None:
            reason = backend.reason_unsupported(operation, device, dtype)
        if backend is None or reason:
            raise BackendError(f"{VARIABLE}={name} cannot do {operation}: {reason}")
        return backend
    for candidate, made_for in BACKENDS.items():
        if made_for not in (None, device.type):
            continue
        backend, reason = _load(candidate)
        if backend is None:
            if counted and made_for and reason and reason != _NOT_INCLUDED:
                _warn_unavailable(candidate, reason)
            continue
        reason = backend.reason_unsupported(operation, device, dtype)
        if reason is None:
            return backend
        if counted:
            fallbacks[operation, candidate, reason] += 1
    raise BackendError(f"no backend can do {operation} on {device.type} {dtype}")


def choose_for(operation: str, tensor: Tensor, counted: bool = True) -> Backend:
    """The backend for ``operation`` on operands like ``tensor``; arguments as of :func:`choose`.

    One that has no memory (fake, meta) goes to the reference, whose plain operations of torch give its shapes.

    Raises:
        BackendError: as :func:`choose`. RuntimeError: a ``torch.func`` transform or ``is_grads_batched`` wraps it.
    """
    if has_memory(tensor):
        return choose(operation, tensor.device, tensor.dtype, counted)
    if forced() not in (None, "reference"):
        raise BackendError(f"{VARIABLE}={forced()} cannot do {operation}: a {type(tensor).__name__} has no memory")
    backend, _ = _load("reference")
    assert backend is not None
    reason = backend.reason_unsupported(operation, tensor.device, tensor.dtype)
    if reason:
        raise BackendError(f"no backend can do {operation}: {reason}")
    return backend
