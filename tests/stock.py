"""What torch itself can do on the processor at hand."""

from __future__ import annotations

import pytest
import torch


def require_lstm(dtype: torch.dtype) -> None:
    """Skip a test whose measure is ``nn.LSTM`` in ``dtype`` where torch has none.

    A CPU's LSTM in half precision is oneDNN's in some versions of torch, which has none without AVX-512.
    """
    try:
        torch.nn.LSTM(1, 1).to(dtype)(torch.zeros(1, 1, 1, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no LSTM in {dtype} here: {str(error).split('.')[0]}")
