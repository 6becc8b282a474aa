"""The reference backend: plain torch, any device, any floating dtype. It defines what correct means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gemm import gemm_bp, gemm_fp, gemm_pack, gemm_wg
from .loss import cross_entropy_backward, cross_entropy_forward
from .lstm import lstm_backward, lstm_forward, lstm_pack
from .pattern import kept_lists

if TYPE_CHECKING:
    import torch

__all__ = [
    "NAME",
    "cross_entropy_backward",
    "cross_entropy_forward",
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

NAME = "reference"


def reason_unavailable() -> str | None:
    """Why this backend cannot run on this machine: never."""
    return None


def reason_unsupported(operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot do ``operation`` on these operands; None when it can."""
    return None if dtype.is_floating_point else f"{operation} needs a floating-point dtype, got {dtype}"
