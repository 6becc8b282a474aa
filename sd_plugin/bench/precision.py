"""The numerical settings under which columns are compared with each other.

| precision | cuDNN's LSTM | other matrix products |
|---|---|---|
| tf32 | float32, products in TF32: torch's default on CUDA | float32 |
| fp32 | float32 | float32 |
| fp16, bf16 | autocast around forward and loss | the same |

Losses of fp16 are not scaled: tiny gradients become zero, which takes no other time; a training would scale them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .columns import BF16, FP16, FP32, TF32

_AUTOCAST = {FP16: torch.float16, BF16: torch.bfloat16}


def dtype(precision: str) -> torch.dtype:
    """What operands of products are stored in."""
    return _AUTOCAST.get(precision, torch.float32)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """For the forward pass and the loss; the backward pass follows what they did."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's own LSTM cannot run under autocast here, None if it can.

    On a CPU it takes what oneDNN has for it, and oneDNN has none in half precision for a processor without AVX-512.
    """
    lstm, x = torch.nn.LSTM(1, 1).to(device), torch.zeros(1, 1, 1, device=device)
    try:
        with torch.autocast(device.type, dtype=dtype):
            lstm(x)
    except RuntimeError as error:
        return f"torch's LSTM has no autocast in {dtype} here: {str(error).split('.')[0]}"
    return None


def settings(precision: str) -> AbstractContextManager[None]:
    """Torch's switches as ``precision`` says; afterwards as they were."""
    return tf32(cudnn=precision != FP32, matmul=False)


def products(precision: str, of_lstm: bool) -> AbstractContextManager[None]:
    """As :func:`settings`, for products by themselves: those of an LSTM in what cuDNN would multiply them in."""
    return tf32(cudnn=precision != FP32, matmul=of_lstm and precision == TF32)


@contextmanager
def tf32(cudnn: bool, matmul: bool) -> Iterator[None]:
    """TF32 allowed in cuDNN and in matrix products, or not.

    By the switches that every supported torch has: one that has newer ones refuses to mix the two kinds.
    """
    of_cudnn, of_matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = of_cudnn.allow_tf32, of_matmul.allow_tf32
    of_cudnn.allow_tf32, of_matmul.allow_tf32 = cudnn, matmul
    try:
        yield
    finally:
        of_cudnn.allow_tf32, of_matmul.allow_tf32 = before
