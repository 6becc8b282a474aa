"""The CPU backend: C++ compiled at first use, for AVX-512, AVX2 or any other machine."""

from .backend import CPU

__all__ = ["BACKEND", "CPU"]

BACKEND = CPU()
