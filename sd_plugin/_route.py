"""The way of a gradient from a product's operand back to the dropout that made it, and whether somebody reads it there.

A product that skips leaves zeros in the skipped columns of the gradient. The dropout would multiply them by zero
anyway, but hooks, ``retain_grad`` and the like look before that, and so the gradient has to be whole for them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.autograd.function import BackwardCFunction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Route:
    """What a gradient passes between a product and a dropout.

    torch keeps hooks of a tensor with the tensor, which is asked now and, as long as it lives, again (the operand of a
    product lives until the backward pass, but under autocast), and hooks of a graph's node where nobody can ask. A view
    of a view has a tensor between that cannot be found, so that it counts as read.

    Args:
        operand: of a product; dropped: itself, or the tensor whose view it is.
        before: the ways from ``dropped`` on, if it was made of other dropped tensors.
        vouched: nobody hooks a tensor between the two.
    """

    __slots__ = ("_before", "_known", "_tensors")

    def __init__(self, operand: Tensor, dropped: Tensor, before: Sequence[Route] = (), vouched: bool = False) -> None:
        # Weak: a hint must not keep memory that the program is done with.
        self._tensors = [weakref.ref(operand)]
        self._before = before
        self._known = _is_read(operand)
        if operand is not dropped:
            self._tensors.append(weakref.ref(dropped))
            self._known = self._known or _is_read(dropped) or not (vouched or _is_one_view(operand, dropped))

    def is_read(self) -> bool:
        """Somebody may read the gradient, so that all of its columns count. Asked again at every backward pass."""
        if self._known:
            return True
        # A loop: a generator would take most of the time.
        for reference in self._tensors:
            tensor = reference()
            if tensor is not None and _is_read(tensor):
                return True
        return bool(self._before) and any(route.is_read() for route in self._before)


def _is_read(tensor: Tensor) -> bool:
    """The gradient of this very tensor goes somewhere else than through the operation that made it."""
    return tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad or bool(tensor._backward_hooks))


def _is_one_view(operand: Tensor, dropped: Tensor) -> bool:
    """One of torch's own view operations is all that is between them."""
    node: Any = operand.grad_fn
    if node is None:  # no gradient, or the view is a leaf, which is read
        return True
    # An autograd function written in Python may be anybody's: that of a module's full backward hook is one.
    if isinstance(node, BackwardCFunction):
        return False
    following = node.next_functions
    return bool(len(following) == 1 and following[0][0] is dropped.grad_fn)
