"""The CUDA backend: kernels compiled by CuPy at first use, and cuBLAS where that is faster.

float32 (in full precision, or in TF32 where torch allows it), float16 and bfloat16; sums are float32. Kernels run on
PyTorch's current stream, never wait for the device, and give the same bits at every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import driver
from .decoder import decoder_backward, decoder_forward
from .gemm import gemm_bp, gemm_fp, gemm_pack, gemm_wg
from .loss import cross_entropy_backward, cross_entropy_forward
from .lstm import lstm_backward, lstm_forward, lstm_pack
from .pattern import kept_lists

if TYPE_CHECKING:
    from torch import device

__all__ = [
    "NAME",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "decoder_backward",
    "decoder_forward",
    "gemm_bp",
    "gemm_fp",
    "gemm_pack",
    "gemm_wg",
    "kept_lists",
    "lstm_backward",
    "lstm_forward",
    "lstm_pack",
    "reason_unavailable",
    "reason_unsupported",
]

NAME = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reason_unavailable() -> str | None:
    """Why this backend cannot run on this machine (no GPU, no CuPy, ...)."""
    return driver.driver().reason_unavailable()


def reason_unsupported(operation: str, device: device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do ``operation`` on these operands; None when it can."""
    return None if dtype in _DTYPES else f"{operation} needs float32, float16 or bfloat16, got {dtype}"
