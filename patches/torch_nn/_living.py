"""The program's LSTMs, which tell what the dimensions of an activation are."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

from torch import nn

from sd_plugin._report import count

from ._capture import is_traced
from ._classes import is_structured, lstm_change, reaches_torch

OTHERS = "recurrent modules other than nn.LSTM"


class LivingLSTMs:
    """They tell an activation's layout by its width. What is asked at every dropout costs no look at each of them."""

    def __init__(self) -> None:
        # By identity: a reference, and what was seen of the LSTM when it was added.
        self._known: dict[int, tuple[weakref.ref[nn.LSTM], object]] = {}
        # Replaced, never cleared: a thread that is about to enter what it has found enters it in the former one.
        self._layouts: dict[int, frozenset[bool]] = {}

    def add(self, lstm: nn.LSTM) -> None:
        """Remember ``lstm`` while it lives."""
        key = id(lstm)
        self._known[key] = weakref.ref(lstm, functools.partial(self._remove, key)), _seen(lstm)
        self._layouts = {}

    def _remove(self, key: int, reference: weakref.ref[nn.LSTM]) -> None:
        # Its place may be another's by now.
        if self._known.get(key, (None,))[0] is reference:
            del self._known[key]
            self._layouts = {}

    def find(self) -> None:
        """Remember those that exist already."""
        for thing in gc.get_objects():
            # Not isinstance, which asks objects that only claim to be something, and runs their code.
            if issubclass(type(thing), nn.LSTM):
                self.add(thing)
            elif issubclass(type(thing), (nn.RNNBase, nn.RNNCellBase)):
                count(OTHERS, type(thing).__name__)

    def check(self, lstm: nn.LSTM) -> None:
        """It is called: is what was seen of it still so? A program may set ``batch_first``, or the class."""
        known = self._known.get(id(lstm))
        if known is not None and known[1] != _seen(lstm):
            self.add(lstm)

    def forget(self) -> None:
        """Remember none."""
        self._known, self._layouts = {}, {}

    def layouts(self, width: int) -> frozenset[bool]:
        """``batch_first`` of the LSTMs that can use a hint and take or give ``width`` units."""
        layouts = self._layouts
        if width not in layouts:
            found = (reference() for reference, _ in list(self._known.values()))
            takers = [lstm for lstm in found if lstm is not None and _takes(lstm, width)]
            layouts[width] = frozenset(lstm.batch_first for lstm in takers)
        return layouts[width]


def _seen(lstm: nn.LSTM) -> object:
    # What is not complete yet is added by another thread, which builds it, again.
    return type(lstm), getattr(lstm, "batch_first", None)


def _takes(lstm: nn.LSTM, width: int) -> bool:
    cls = type(lstm)
    # The quick question first: there may be many, and few of that width.
    if lstm.proj_size or width not in (lstm.input_size, lstm.hidden_size * (1 + lstm.bidirectional)):
        return False
    return is_structured(cls) or (not lstm_change(cls) and reaches_torch(cls))


lstms = LivingLSTMs()


def remembering(stock: Any) -> Any:
    """``__init__`` and ``__setstate__`` of `nn.RNNBase` and `nn.RNNCellBase`: new, copied and unpickled modules."""

    @functools.wraps(stock)
    def remember(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if is_traced():
            return
        if isinstance(self, nn.LSTM):
            lstms.add(self)
        else:
            count(OTHERS, type(self).__name__)

    return remember
