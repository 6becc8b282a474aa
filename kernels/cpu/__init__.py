"""The CPU backend: C++ compiled at first use, for AVX-512, AVX2 or any other machine.

float32 and float64 in their own precision; bfloat16 and float16 are computed, and accumulated, in float32.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from .decoder import decoder_backward, decoder_forward
from .gemm import gemm_bp, gemm_fp, gemm_pack, gemm_wg
from .library import describe, load
from .loss import cross_entropy_backward, cross_entropy_forward
from .lstm import lstm_backward, lstm_forward, lstm_pack
from .toolchain import BuildError

if TYPE_CHECKING:
    from torch import device

__all__ = [
    "NAME",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "decoder_backward",
    "decoder_forward",
    "describe",
    "gemm_bp",
    "gemm_fp",
    "gemm_pack",
    "gemm_wg",
    "lstm_backward",
    "lstm_forward",
    "lstm_pack",
    "reason_unavailable",
    "reason_unsupported",
]

NAME = "cpu"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def reason_unavailable() -> str | None:
    """Why this backend cannot run on this machine (no compiler, ...); compiles the library if need be."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def reason_unsupported(operation: str, device: device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do ``operation`` on these operands; None when it can."""
    if operation == "cross_entropy" and dtype not in _DTYPES[:2]:
        return f"{operation} needs float32 or float64, got {dtype}"
    return None if dtype in _DTYPES else f"{operation} needs a floating-point dtype, got {dtype}"
