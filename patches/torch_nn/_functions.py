"""What stands in for functions: ``torch.addmm``, ``pack_padded_sequence`` and ``torch.jit.script``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _hints
from ._capture import compiler, is_traced, is_watched
from ._modules import are_ordinary


class Changed(Protocol):
    """An attribute that was replaced, with what was there."""

    @property
    def owner(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def stock(self) -> Any: ...
    @property
    def replacement(self) -> Any: ...


def addmm(stock: Any) -> Any:
    """``torch.addmm``, which is what projections written by hand call."""

    @functools.wraps(stock)
    def addmm(*args: Any, **kwargs: Any) -> Any:
        # Factors, other spellings and a bias that is not one of a linear layer are torch's.
        known = len(args) == 3 and not kwargs
        if known and not is_traced() and compiler() is None and _hints.find(args[1]) is not None:
            bias, x, weight = args
            if are_ordinary(weight, bias) and x.dim() == 2 and bias.shape == weight.shape[1:]:
                from sd_plugin import functional

                return functional.linear(x, weight.t(), bias)
        return stock(*args, **kwargs)

    return addmm


def packing(stock: Any) -> Any:
    """``pack_padded_sequence``, which carries a hint over."""

    @functools.wraps(stock)
    def pack_padded_sequence(
        input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
    ) -> PackedSequence:
        packed: PackedSequence = stock(input, lengths, batch_first, enforce_sorted)
        if not is_traced() and compiler() is None and _hints.find(input) is not None and not is_watched():
            from sd_plugin.kernels import Steps

            # Sorting moves rows within a time step, where all have the same kept units.
            steps = Steps.packed(packed.batch_sizes.tolist())
            _hints.carry(input, Steps(int(batch_first)), packed.data, steps)
        return packed

    return pack_padded_sequence


def script(stock: Any, changes: Sequence[Changed]) -> Any:
    """``torch.jit.script``, which compiles source, and these functions are not written in its language."""

    replaced = {id(change.replacement): change.stock for change in changes}

    @functools.wraps(stock)
    def script(obj: Any, optimize: Any = None, _frames_up: int = 0, _rcb: Any = None, *rest: Any, **named: Any) -> Any:
        # A scripted function that has imported a replacement by its name makes the compiler come here with it.
        if inspect.isfunction(replaced.get(id(obj))):
            obj = replaced[id(obj)]
            _rcb = torch._jit_internal.createResolutionCallbackFromClosure(obj)
        with _stock_in_place(changes), _known_as_builtins(changes):
            return stock(obj, optimize, _frames_up + 1, _rcb, *rest, **named)

    return script


@contextmanager
def _stock_in_place(changes: Sequence[Changed]) -> Iterator[None]:
    # Whatever is there now is put back, be it another patch's.
    present = [vars(change.owner)[change.name] for change in changes]
    try:
        for change in changes:
            setattr(change.owner, change.name, change.stock)
        yield
    finally:
        for change, value in zip(changes, present, strict=True):
            setattr(change.owner, change.name, value)


@contextmanager
def _known_as_builtins(changes: Sequence[Changed]) -> Iterator[None]:
    """A scripted function may have imported a replacement by its name: the compiler takes it for what it replaces."""
    from torch.jit import _builtins

    table: dict[int, str] = _builtins._get_builtin_table()
    named = {id(change.replacement): table.get(id(change.stock)) for change in changes}
    # Only as long as they surely live, since they are known by their addresses.
    added = {key: name for key, name in named.items() if name is not None and key not in table}
    table.update(added)
    try:
        yield
    finally:
        for key in added:
            del table[key]
