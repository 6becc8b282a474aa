"""Tools that record a program (``torch.compile``, ``export``, ``fx``, ``jit``), and what our modules are to them.

A module of ours that drops nothing is torch's own to them; one that does is run, or refused in one sentence.
"""

from __future__ import annotations

import sys
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

_PLAIN = (Tensor, nn.Parameter)


def is_stock(module: nn.Module) -> bool:
    """The program is recorded by torch's compiler or exporter, and ``module`` is to be torch's own in what they make.

    While a program trains under ``torch.compile``, a tensor may come with a hint from what ran before the graph.
    """
    return is_compiling() and (not module.training or is_exporting())


def _is_written_down() -> bool:
    """What runs becomes a program (``torch.jit.trace``, ``torch.export``, ``make_fx``), or is not run at all.

    What a kernel returns would be a constant in that program.
    """
    if torch._C._get_tracing_state() is not None or is_exporting():
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is None:
        return False
    # torch 2.2 has it under another name.
    mode = getattr(proxies, "get_proxy_mode", None) or proxies.get_innermost_proxy_mode
    return mode() is not None


def _is_plain(x: Tensor) -> bool:
    """Operations on ``x`` are torch's own, on memory: it is no fake or meta tensor, nor is a transform active.

    One that does not wrap ``x`` may wrap what it meets.
    """
    kind = type(x)
    # A subclass that has operations of its own, as fake tensors do; others are ordinary memory.
    own = kind in _PLAIN or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return own and not x.is_meta and not torch._C._are_functorch_transforms_active()


def is_recorded(x: Tensor) -> bool:
    """Operations on ``x`` are recorded, by whatever tool, so that kernels on its memory would not do."""
    return is_compiling() or _is_written_down() or not _is_plain(x)


def refuse_recording(module: nn.Module) -> None:
    """RuntimeError if what ``module`` runs is written down: kernels of its own cannot be."""
    if _is_written_down():
        raise RuntimeError(
            f"{type(module).__name__} runs kernels of its own in training, which torch.jit.trace, torch.export and "
            f"make_fx cannot look into: {REMEDY}"
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
