"""The attributes of torch that are replaced, each checked to be what its replacement was written for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import rnn

from sd_plugin.errors import UsageError

from . import _functions, _modules
from ._living import remembering
from ._packed import remembering as remembering_rows
from ._settings import Settings


@dataclass(frozen=True)
class Change:
    """One attribute of torch, what it is, and what takes its place."""

    owner: Any
    name: str
    stock: Any
    replacement: Any

    @property
    def may_be_imported(self) -> bool:
        """A module may have taken it by its name; a method is found in its class."""
        return isinstance(self.owner, ModuleType)


def changes(settings: Settings) -> list[Change]:
    """All replacements, none of them made yet.

    Raises:
        UsageError: this torch has not the functions that they were written for.
    """
    table: list[tuple[Any, str, str | None, Callable[[Any], Any]]] = [
        (nn.RNNBase, "__init__", None, remembering),
        (nn.RNNBase, "__setstate__", None, remembering),
        (nn.RNNCellBase, "__init__", None, remembering),
        (nn.Dropout, "forward", "self input", functools.partial(_modules.dropout_forward, settings)),
        (nn.LSTM, "forward", "self input hx", functools.partial(_modules.lstm_forward, settings)),
        (nn.Linear, "forward", "self input", _modules.linear_forward),
        (torch, "addmm", None, _functions.addmm),
        (rnn, "pack_padded_sequence", "input lengths batch_first enforce_sorted", _functions.packing),
        (rnn.PackedSequence, "__new__", "cls data batch_sizes sorted_indices unsorted_indices", remembering_rows),
    ]
    found = []
    for owner, name, arguments, replacement in table:
        stock = _expected(owner, name, arguments)
        found.append(Change(owner, name, stock, replacement(stock)))
    script = _expected(torch.jit, "script", "obj optimize _frames_up _rcb example_inputs")
    return [*found, Change(torch.jit, "script", script, _functions.script(script, found))]


def _expected(owner: Any, name: str, arguments: str | None) -> Any:
    """``owner``'s own attribute ``name``, which takes these arguments (None: those of built-ins are not known)."""
    stock = vars(owner).get(name)
    told = f"{owner.__name__}.{name}"
    if not callable(stock):
        raise UsageError(f"this torch cannot be patched: it has no {told}")
    if arguments is not None:
        found = " ".join(inspect.signature(stock).parameters)
        if found != arguments:
            raise UsageError(f"this torch cannot be patched: {told} takes ({found}), not ({arguments})")
    return stock
