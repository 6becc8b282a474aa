"""Tools that record a program (``torch.compile``, ``export``, ``fx``, ``jit``), and what our modules are to them.

A module of ours that drops nothing is torch's own to them; one that does is run, or refused in one sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["NotQuantized", "Proxy", "as_node", "is_recorded", "is_stock", "refuse_recording"]

#: What to do instead, in every message.
REMEDY = "call .eval() first, or sd_plugin.to_stock(model) for torch's own dropout"

#: Why torch.compile and torch.export do not look into an operation; torch shows it with its own message.
OPAQUE = f"what sd_plugin drops is no part of a graph: without fullgraph=True it runs between two; else {REMEDY}"

# torch 2.2 has the first of them elsewhere, and the second not at all.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

#: What ``torch.fx`` passes through a program in place of a tensor.
Proxy: Any = fx.Proxy

#: A tensor inside ``torch.func.vmap``, ``grad`` and the like.
_is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

_PLAIN = (Tensor, nn.Parameter)


def is_stock(module: nn.Module) -> bool:
    """The program is recorded by torch's compiler or exporter, and ``module`` is to be torch's own in what they make.

    While a program trains under ``torch.compile``, a tensor may come with a hint from what ran before the graph.
    """
    return is_compiling() and (not module.training or is_exporting())


def _is_recorded(x: Tensor) -> bool:
    """``x`` stands for a tensor, or what is done with it is written down: kernels cannot be run on it."""
    if torch._C._get_tracing_state() is not None or x.is_meta or _is_transformed(x):
        return True
    kind = type(x)
    # A subclass that has operations of its own, as fake tensors do; others are ordinary memory.
    return kind not in _PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_recorded(*tensors: Tensor) -> bool:
    """Operations on these are recorded, by whatever tool."""
    return is_compiling() or any(_is_recorded(x) for x in tensors)


def refuse_recording(module: nn.Module, x: Tensor) -> None:
    """RuntimeError if kernels that ``module`` runs on ``x`` cannot be recorded, or have no memory to run on."""
    if _is_recorded(x):
        raise RuntimeError(
            f"{type(module).__name__} runs kernels of its own in training, which torch.jit.trace, torch.export and "
            f"torch.func cannot look into, and for which fake and meta tensors have no memory: {REMEDY}"
        )


def as_node(module: nn.Module, stock: Callable[..., Any], drops: bool, *arguments: Any) -> Any:
    """The call of ``module`` while ``torch.fx`` records: one node of the graph, as those of torch's own modules are.

    Args:
        stock: torch's ``forward``, recorded where ``module`` is the whole program and a node would call itself.
        drops: ``module`` drops units, which ``stock`` would not do.
        *arguments: of the call; the first is a `Proxy`.

    Raises:
        RuntimeError: ``module`` is the whole program, and drops.
    """
    tracer: Any = arguments[0].tracer
    path = tracer.path_of_module(module)
    if path:
        return tracer.create_proxy("call_module", path, arguments, {})
    if drops:
        raise RuntimeError(f"torch.fx cannot record a {type(module).__name__} by itself in training: {REMEDY}")
    return stock(*arguments)


class NotQuantized:
    """The attribute ``qconfig`` of our modules: whoever sets it is told that torch's quantization passes them over.

    `torch.ao.quantization` sets it in every module, and then replaces those whose class it knows.
    """

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError(f"{owner.__name__!r} object has no attribute 'qconfig'") from None

    def __set__(self, module: nn.Module, value: object) -> None:
        module.__dict__["qconfig"] = value
        warnings.warn(
            f"quantization knows torch's classes by name and leaves this {type(module).__name__}: "
            "sd_plugin.to_stock(model) first",
            stacklevel=2,
        )

    def __delete__(self, module: nn.Module) -> None:
        module.__dict__.pop("qconfig", None)
