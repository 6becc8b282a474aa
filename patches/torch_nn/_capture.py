"""Whether torch records what is called: what stands in for its functions must then be torch's own.

`is_traced` is what a replacement asks before anything else. ``torch.compile`` knows the answer while it reads the
replacement's code, and so sees nothing there but the call of torch's function. `is_watched` finds all others, and is
asked only by who would do something else than torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

#: ``torch.compile`` reads the code that asks. (torch 2.2 has this under another name.)
is_traced: Callable[[], bool] = (
    torch.compiler.is_dynamo_compiling if hasattr(torch.compiler, "is_dynamo_compiling") else torch._utils.is_compiling
)


def is_watched() -> bool:
    """Somebody is to see the operations of torch that this call comes to, or runs it on tensors without memory.

    ``torch.jit.trace``; a dispatch mode, as fake tensors, ``make_fx`` and counters of operations use; a transform of
    ``torch.func``, such as ``vmap``; a function under ``torch.compile``, between two of its graphs.
    """
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or _is_between_graphs()
    )


def _is_between_graphs() -> bool:
    # Importing it takes a second. It is there if the program compiles anything.
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._C._dynamo import eval_frame

    # torch 2.2 to 2.5 tell it only to who changes it.
    if hasattr(eval_frame, "get_eval_frame_callback"):
        return eval_frame.get_eval_frame_callback() is not None
    callback = eval_frame.set_eval_frame(None)
    eval_frame.set_eval_frame(callback)
    return callback is not None
