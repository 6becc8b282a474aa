"""Whether torch records what is called: what stands in for its functions must then be torch's own.

`is_traced` is what a replacement asks before anything else. ``torch.compile`` knows the answer while it reads the
replacement's code, and so sees nothing there but the call of torch's function. `compiler` is asked next, before any
other function of this package: the compiler would read that too, in vain, and warn of what it does not know in there.
`is_watched` finds all others, and is asked only by who would do something else than torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

#: ``torch.compile`` reads the code that asks. (torch 2.2 has this under another name.)
is_traced: Callable[[], bool] = (
    torch.compiler.is_dynamo_compiling if hasattr(torch.compiler, "is_dynamo_compiling") else torch._utils.is_compiling
)


def _find_compiler() -> Callable[[], object]:
    # There if torch is, unlike what `torch._dynamo` imports.
    from torch._C._dynamo import eval_frame

    # It has no code that could be read, being torch's own in C.
    if hasattr(eval_frame, "get_eval_frame_callback"):
        found: Callable[[], object] = eval_frame.get_eval_frame_callback
        return found

    # torch 2.2 to 2.5 tell it only to who changes it.
    def ask() -> object:
        if "torch._dynamo" not in sys.modules:
            return None
        callback = eval_frame.set_eval_frame(None)
        eval_frame.set_eval_frame(callback)
        return callback

    eval_frame.skip_code(ask.__code__)  # type: ignore[attr-defined]
    return ask


#: Not None while a function under ``torch.compile`` runs, between two of its graphs.
compiler = _find_compiler()


def is_watched() -> bool:
    """Somebody is to see the operations of torch that this call comes to, or runs it on tensors without memory.

    ``torch.jit.trace``; a dispatch mode, as fake tensors, ``make_fx`` and counters of operations use; a transform of
    ``torch.func``, such as ``vmap``; a function under ``torch.compile``, between two of its graphs.
    """
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or compiler() is not None
    )
