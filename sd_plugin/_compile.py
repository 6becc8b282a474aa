"""``torch.compile``: operations that it runs as they are, between the graphs that it makes of the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

_F = TypeVar("_F", bound=Callable[..., Any])


def opaque(function: _F) -> _F:
    """``function``, into which ``torch.compile`` does not look: one break of the graph around it, none inside.

    What a hint says of a tensor is no part of a graph, and what runs inside are kernels already.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            # Importing it takes a second, which a program that compiles nothing should not pay.
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            import torch._dynamo

            disabled.append(torch._dynamo.disable(function))
        return disabled[0](*args, **kwargs)

    return cast("_F", call)
