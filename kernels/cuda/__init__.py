"""The CUDA backend: kernels compiled by CuPy at first use, and cuBLAS where that is faster."""

from .backend import CUDA

__all__ = ["BACKEND", "CUDA"]

BACKEND = CUDA()
