"""Which subclasses of `nn.LSTM` and `nn.Dropout` compute what these do, so that they may be given structured dropout.

A patched ``forward`` is what a subclass reaches by ``super().forward``. A call of `nn.LSTM`'s is replaced as a whole,
so a subclass must not have changed what torch's own would use: a method of `nn.LSTM` or `nn.RNNBase`, an attribute, a
parameter (parametrizations make properties of those), or how attributes are looked up. A ``forward`` and an
``__init__`` of its own, and new names, are its own business.

What `nn.Dropout` is given is an activation to us. A subclass with a ``forward`` may pass on a mask instead, so there
that is one change too many.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Iterator
from types import CodeType

from torch import nn

#: What every LSTM has in its ``__dict__``, and its forward reads.
_ATTRIBUTES = (
    *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
    *("proj_size", "training", "_parameters", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"),
)
_LOOKUP = ("__getattr__", "__getattribute__", "__setattr__")
_PARAMETER = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d+(_reverse)?")
#: Methods of theirs that a forward does not use.
_FREE = ("forward", "extra_repr", "reset_parameters")

_verdicts: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def lstm_change(cls: type) -> str:
    """The name by which a subclass of `nn.LSTM` changes what its forward computes; ``""`` if it changes nothing."""
    if cls is nn.LSTM:
        return ""
    if cls not in _verdicts:
        theirs = {name for base in (nn.LSTM, nn.RNNBase) for name in vars(base)}
        used = {name for name in theirs if not name.startswith("__")}.difference(_FREE).union(_ATTRIBUTES, _LOOKUP)
        _verdicts[cls] = next((n for n in _own_names(cls, nn.LSTM) if n in used or _PARAMETER.fullmatch(n)), "")
    return _verdicts[cls]


def dropout_change(cls: type) -> str:
    """The same for a subclass of `nn.Dropout`, whose ``forward`` counts too."""
    if cls is nn.Dropout:
        return ""
    if cls not in _verdicts:
        used = {"forward", "p", "inplace", "training", *_LOOKUP}
        _verdicts[cls] = next((name for name in _own_names(cls, nn.Dropout) if name in used), "")
    return _verdicts[cls]


def reaches_torch(cls: type) -> bool:
    """As far as can be read, a subclass of `nn.LSTM` that has a ``forward`` calls that of `nn.LSTM` in it."""
    for base in _between(cls, nn.LSTM):
        if "forward" in vars(base):
            code = getattr(inspect.unwrap(vars(base)["forward"]), "__code__", None)
            if code is None or not any("forward" in part.co_names for part in _codes(code)):
                return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _between(cls: type, base: type) -> tuple[type, ...]:
    """The classes whose attributes stand before those of ``base``."""
    return cls.__mro__[: cls.__mro__.index(base)]


def _own_names(cls: type, base: type) -> Iterator[str]:
    for between in _between(cls, base):
        yield from vars(between)


def is_structured(cls: type) -> bool:
    """It is this library's LSTM."""
    # Nobody has one before it is loaded, which it may be right now.
    own = getattr(sys.modules.get("sd_plugin.lstm"), "StructuredDropoutLSTM", None)
    return own is not None and issubclass(cls, own)
