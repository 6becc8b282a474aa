"""The rows of packed sequences: which tensors are the data of one, and how many rows each of their time steps has."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from ._capture import is_traced

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.utils.rnn import PackedSequence

    from sd_plugin.kernels import Steps


class PackedRows:
    """Tensors that are the data of a packed sequence, while they live."""

    def __init__(self) -> None:
        # By identity, since tensors compare their elements.
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def add(self, packed: PackedSequence) -> None:
        """Remember the rows of ``packed.data``."""
        key = id(packed.data)
        self._known[key] = weakref.ref(packed.data, functools.partial(self._remove, key)), packed.batch_sizes

    def _remove(self, key: int, reference: weakref.ref[Tensor]) -> None:
        # Its place may be another's by now.
        if self._known.get(key, (None,))[0] is reference:
            del self._known[key]

    def forget(self) -> None:
        """Remember none."""
        self._known = {}

    def steps(self, data: Tensor) -> Steps | None:
        """The time steps of ``data``; None if it is no packed sequence's, or of one that torch would not make."""
        known = self._known.get(id(data))
        if known is None or known[0]() is not data:
            return None
        from sd_plugin.kernels import Steps

        try:
            steps = Steps.packed(known[1].tolist())
            steps.check("data", data)
        except ValueError:
            return None
        return steps


rows = PackedRows()


def remembering(stock: Any) -> Any:
    """``PackedSequence.__new__``, by which all of them come about."""
    new = stock.__func__

    @functools.wraps(new)
    def remember(cls: type[PackedSequence], *args: Any, **kwargs: Any) -> PackedSequence:
        packed: PackedSequence = new(cls, *args, **kwargs)
        if not is_traced() and type(packed.data) is _tensor():
            rows.add(packed)
        return packed

    return staticmethod(remember)


@functools.cache
def _tensor() -> type:
    import torch

    return torch.Tensor
