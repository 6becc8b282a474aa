"""``torch.compile``: operations that it runs as they are, between the graphs that it makes of the rest."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ._capture import OPAQUE

_F = TypeVar("_F", bound=Callable[..., Any])


def opaque(function: _F) -> _F:
    """``function``, into which ``torch.compile`` does not look: one break of the graph around it, none inside.

    What a hint says of a tensor is no part of a graph, and what runs inside are kernels already.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Importing it takes a second, which a program that compiles nothing should not pay. Under torch.jit.trace it
        # compiles nothing either, and an old torch refuses what was wrapped by it.
        if "torch._dynamo" not in sys.modules or torch._C._get_tracing_state() is not None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(_disabled(function))
        return disabled[0](*args, **kwargs)

    # As torch marks what it is not to look into: here it says why, where the graph must not be broken.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = OPAQUE  # type: ignore[attr-defined]
    return cast("_F", call)


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    # Later versions take a reason.
    told = {"reason": OPAQUE} if "reason" in inspect.signature(torch._dynamo.disable).parameters else {}
    return cast("Callable[..., Any]", torch._dynamo.disable(function, **told))
