"""The CPU backend: what it does faster than the reference, which is all but the drawing of kept units.

Results in recycled memory; float32 and float64 in their own precision, half types computed in float32.
"""

from __future__ import annotations

from functools import cache

import torch

from ..reference import Reference
from . import decoder, gemm, library, loss, lstm
from .toolchain import BuildError

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CPU(Reference):
    """One call of the compiled library for each call."""

    name = "cpu"
    decodes_at_once = True

    def reason_unavailable(self) -> str | None:
        """Why this backend cannot run on this machine (no compiler, ...); compiles the library if need be."""
        return _reason_unavailable()

    def reason_unsupported(self, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if operation == "cross_entropy" and dtype not in _DTYPES[:2]:
            return f"{operation} needs float32 or float64, got {dtype}"
        return None if dtype in _DTYPES else f"{operation} needs a floating-point dtype, got {dtype}"

    def describe(self) -> dict[str, str]:
        return library.describe()

    gemm_pack = staticmethod(gemm.gemm_pack)
    gemm_fp = staticmethod(gemm.gemm_fp)
    gemm_bp = staticmethod(gemm.gemm_bp)
    gemm_wg = staticmethod(gemm.gemm_wg)
    cross_entropy_forward = staticmethod(loss.cross_entropy_forward)
    cross_entropy_backward = staticmethod(loss.cross_entropy_backward)
    lstm_pack = staticmethod(lstm.lstm_pack)
    lstm_forward = staticmethod(lstm.lstm_forward)
    lstm_backward = staticmethod(lstm.lstm_backward)
    decoder_forward = staticmethod(decoder.decoder_forward)
    decoder_backward = staticmethod(decoder.decoder_backward)


@cache
def _reason_unavailable() -> str | None:
    try:
        library.load()
    except BuildError as error:
        return str(error)
    return None
