"""What operands are rounded to before they are multiplied; sums are always float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Precision(IntEnum):
    """Of a kernel's operands; the numbers are those of ``SD_PRECISION`` in the sources."""

    STRICT = 0  #: float32
    TF32 = 1  #: float32 rounded to ten bits of mantissa, on tensor cores
    F16 = 2
    BF16 = 3

    @property
    def dtype(self) -> torch.dtype:
        """Of operands in memory."""
        return {self.F16: torch.float16, self.BF16: torch.bfloat16}.get(self, torch.float32)


def of_products(dtype: torch.dtype) -> Precision:
    """Of matrix products: TF32 where torch allows it for its own (``torch.backends.cuda.matmul.allow_tf32``)."""
    return _of(dtype, torch.backends.cuda.matmul)


def of_recurrence(dtype: torch.dtype) -> Precision:
    """Of LSTM layers: TF32 where torch allows it for ``nn.LSTM`` (``torch.backends.cudnn.allow_tf32``)."""
    return _of(dtype, torch.backends.cudnn)


def _of(dtype: torch.dtype, flags: Any) -> Precision:
    if dtype == torch.float16:
        return Precision.F16
    if dtype == torch.bfloat16:
        return Precision.BF16
    return Precision.TF32 if _allows_tf32(flags) else Precision.STRICT


def _allows_tf32(flags: Any) -> bool:
    try:
        return bool(flags.allow_tf32)
    except RuntimeError:
        # A program that sets the flags of torch >= 2.9 may not read the older ones any more.
        return bool(getattr(flags, "rnn", flags).fp32_precision == "tf32")


@contextmanager
def cublas(tf32: bool) -> Iterator[None]:
    """cuBLAS rounds float32 operands to TF32, or does not, whatever the program chose for its own products.

    The choice is one of the whole process; what it was comes back in the form in which it was made.
    """
    flags: Any = torch.backends.cuda.matmul
    if hasattr(flags, "fp32_precision"):  # torch >= 2.9
        before = flags.fp32_precision
        if tf32 is (before == "tf32"):
            yield
            return
        flags.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            flags.fp32_precision = before
        return
    if flags.allow_tf32 is tf32:
        yield
        return
    # The flag alone would forget "medium".
    level = torch.get_float32_matmul_precision()
    flags.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(level)


def product(a: Tensor, b: Tensor, precision: Precision, dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b`` by cuBLAS.

    Args:
        a: ``[M, K]``, b: ``[K, N]``, of ``precision.dtype``.
        dtype: of the result; that of the operands if None.
    """
    with cublas(precision is Precision.TF32):
        if dtype in (None, a.dtype):
            return a @ b
        if a.is_cuda and HAS_OUT_DTYPE:
            return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


#: ``torch.mm`` can keep the float32 sums of half-precision operands.
HAS_OUT_DTYPE = "mm.dtype" in {name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names()}
