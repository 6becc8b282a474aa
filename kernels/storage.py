"""Tensors and their memory: which of them have any, and the one place where its address is taken.

A fake or meta tensor, a tensor that a ``torch.func`` transform or ``is_grads_batched`` wraps, and a subclass with a
``__torch_dispatch__`` of its own stand for values that no address leads to: it would be 0, or that of something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: Types whose operations are torch's own; a look at the type is all that most tensors cost.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

NO_TRANSFORMS = (
    "products that skip dropped units cannot see through torch.func transforms (vmap, grad, jvp, ...) or "
    "is_grads_batched=True: do without them, call .eval() first, or sd_plugin.to_stock(model) for torch's own dropout"
)


def has_memory(tensor: Tensor) -> bool:
    """The values of ``tensor`` lie in memory; False of fake, meta and sparse tensors and of subclasses that dispatch.

    Raises:
        RuntimeError: a ``torch.func`` transform or ``is_grads_batched`` wraps it.
    """
    if type(tensor) not in _PLAIN and torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        return False
    try:
        return tensor.data_ptr() != 0 or (tensor.numel() == 0 and not tensor.is_meta)
    except RuntimeError as error:
        if tensor.layout != torch.strided:
            return False
        raise RuntimeError(NO_TRANSFORMS) from error


def refuse_transforms() -> None:
    """RuntimeError within a ``torch.func`` transform, whether or not it wraps the tensors at hand."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(NO_TRANSFORMS)


def place(tensor: Tensor) -> int:
    """Where the values of ``tensor`` lie; 0 if nowhere.

    Raises:
        RuntimeError: as :func:`has_memory`.
    """
    return tensor.data_ptr() if has_memory(tensor) else 0


def address(tensor: Tensor) -> int:
    """Where the values of ``tensor`` lie, for a kernel to read; an empty tensor may lie at 0.

    Raises:
        RuntimeError: it has no memory.
    """
    try:
        found = tensor.data_ptr()
    except RuntimeError:
        found = 0  # asked again below, for the reason
    if found == 0 and not has_memory(tensor):
        kind = "meta tensor" if tensor.is_meta else type(tensor).__name__
        raise RuntimeError(
            f"products that skip dropped units need values in memory, got a {kind} of shape {list(tensor.shape)}"
        )
    return found
