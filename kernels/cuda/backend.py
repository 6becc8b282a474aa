"""The CUDA backend: what it does with kernels of its own, which is everything; cuBLAS where that is faster.

float32 (in full precision, or in TF32 where torch allows it), float16 and bfloat16; sums are float32. Kernels run on
PyTorch's current stream, never wait for the device, and give the same bits at every run.
"""

from __future__ import annotations

import torch

from ..reference import Reference
from . import decoder, driver, gemm, loss, lstm, pattern

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CUDA(Reference):
    """Kernels compiled by CuPy at first use."""

    name = "cuda"
    decodes_at_once = True

    def reason_unavailable(self) -> str | None:
        """Why this backend cannot run on this machine (no GPU, no CuPy, ...)."""
        return driver.driver().reason_unavailable()

    def reason_unsupported(self, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype in _DTYPES else f"{operation} needs float32, float16 or bfloat16, got {dtype}"

    kept_lists = staticmethod(pattern.kept_lists)
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
