"""What a program said about TF32 is followed, and is what it was after our products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sd_plugin.kernels.cuda.precision import Precision, cublas, of_products, of_recurrence, product

from ..tolerances import assert_close, partial_sums
from .cases import tensor_of


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    modern = hasattr(matmul, "fp32_precision")
    before = (matmul.fp32_precision, cudnn.rnn.fp32_precision) if modern else (matmul.allow_tf32, cudnn.allow_tf32)
    yield
    if modern:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, cudnn.rnn.fp32_precision = before
    else:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _level(level: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(level)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("state", [lambda: None, *map(_level, ("highest", "high", "medium"))])
def test_a_program_s_choice_survives(state: Callable[[], None], tf32: bool) -> None:
    state()
    before = torch.get_float32_matmul_precision()
    flags = torch.backends.cuda.matmul
    flag = getattr(flags, "fp32_precision", None)
    with cublas(tf32):
        pass
    with pytest.raises(ZeroDivisionError), cublas(tf32):
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before
    assert getattr(flags, "fp32_precision", None) == flag


def test_layers_follow_cudnn_and_products_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert of_recurrence(torch.float32) is Precision.TF32
    assert of_products(torch.float32) is Precision.STRICT
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert of_recurrence(torch.float32) is Precision.STRICT
    for dtype, precision in ((torch.float16, Precision.F16), (torch.bfloat16, Precision.BF16)):
        assert of_recurrence(dtype) is of_products(dtype) is precision
        assert precision.dtype == dtype


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
def test_the_newer_flags_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert of_products(torch.float32) is Precision.TF32
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert of_recurrence(torch.float32) is Precision.STRICT


def test_half_operands_have_float_sums_where_asked() -> None:
    a, b = tensor_of(0, 2, 512).half(), tensor_of(1, 512, 3).half()
    exact = a.double() @ b.double()
    got = product(a, b, Precision.F16, torch.float32)
    assert got.dtype == torch.float32
    assert_close(got, exact, 512, depth=1, magnitude=partial_sums(a, b), exact=True)
    assert product(a, b, Precision.F16).dtype == torch.float16
