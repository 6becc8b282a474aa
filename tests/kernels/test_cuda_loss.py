"""The CUDA cross entropy, emulated on the CPU, against torch's in float64, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin.kernels.cuda import driver
from sd_plugin.kernels.cuda.loss import cross_entropy_backward, cross_entropy_forward

from ..emulation.emulator import EmulatedDriver, EmulationError
from ..tolerances import assert_close
from .cases import STRIDES, strided, tensor_of

EMULATED = EmulatedDriver()
pytestmark = pytest.mark.skipif(EMULATED.reason_unavailable() is not None, reason="no C++ compiler")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def both(
    logits: Tensor, target: Tensor, ignored: int, smoothing: float, scale: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logarithms of sums, gradient."""
    EMULATED.seed, EMULATED.launches = seed + 1, 0
    with driver.use(EMULATED):
        loss, lse = cross_entropy_forward(logits, target, ignored, smoothing)
        return loss, lse, cross_entropy_backward(logits, target, ignored, smoothing, lse, scale)


@DTYPES
@settings(max_examples=60)
@given(
    rows=st.integers(0, 6), columns=st.integers(1, 40) | st.sampled_from([130, 513, 3000, 9001]),
    seed=st.integers(0, 10**6), how=STRIDES, start=st.integers(0, 9), smoothing=st.sampled_from([0.0, 0.1]),
    spread=st.sampled_from([1.0, 30.0]), ignored=st.sampled_from([-1, 0, -100, 2**40, -(2**63)]),
    shared=st.booleans(),
)  # fmt: skip
def test_forward_and_backward(
    dtype: torch.dtype, rows: int, columns: int, seed: int, how: str, start: int, smoothing: float, spread: float,
    ignored: int, shared: bool,
) -> None:  # fmt: skip
    # `start`: what the row is a part of begins elsewhere than it, so rows lie at any element.
    logits = (tensor_of(seed, rows, start + columns) * spread).to(dtype)
    wide, logits = strided(logits, how), logits[:, start:]
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, columns, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = ignored
    scale = tensor_of(seed + 1, 1).to(dtype).expand(rows) if shared else tensor_of(seed + 1, rows).to(dtype)
    exact = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        exact, target.where(target != ignored, -1), ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    if 0 <= ignored < columns:
        loss = torch.where(target == ignored, 0, loss)
    (gradient,) = torch.autograd.grad(loss, exact, scale.double()) if rows else (exact,)

    got, lse, dlogits = both(wide[:, start:], target, ignored, smoothing, scale, seed)

    assert got.dtype == dlogits.dtype == dtype and lse.dtype == torch.float32 and dlogits.is_contiguous()
    # The exponential of a logit turns its rounding, which grows with it, into a share of the result.
    largest = max(1.0, float(exact.detach().abs().max())) if rows else 1.0
    of_scale = max(1.0, float(scale.abs().max())) if rows else 1.0
    assert_close(lse, exact.logsumexp(1), columns, depth=1, magnitude=largest, exact=True)
    assert_close(got, loss, columns, depth=1, magnitude=largest, exact=True)
    assert_close(dlogits, gradient, columns, depth=1, magnitude=largest * of_scale, exact=True)


@DTYPES
@pytest.mark.parametrize("columns", [3, 41, 3000])
def test_numbers_that_are_none(dtype: torch.dtype, columns: int) -> None:
    inf = float("inf")
    logits = torch.zeros(5, columns)
    logits[0, 0], logits[1, columns - 1], logits[2, 1] = float("nan"), float("nan"), inf
    logits[3, :-1] = -inf
    logits[4] = -inf
    target = torch.full((5,), columns - 1)
    loss, lse, gradient = both(logits.to(dtype), target, -100, 0.0, torch.ones(5, dtype=dtype))
    assert loss.isnan().tolist() == [True, True, False, False, True]
    assert lse[2:].tolist() == [inf, 0, -inf] and loss[2:4].tolist() == [inf, 0]
    # A masked column costs nothing.
    assert gradient[3].tolist() == [0] * columns


@pytest.mark.parametrize("wrong", [-1, 5, 2**32, -(2**32) + 1])
def test_a_target_that_is_no_column_stops_the_kernel(wrong: int) -> None:
    logits, target = torch.zeros(2, 5), torch.tensor([1, wrong])
    with driver.use(EMULATED):
        with pytest.raises(EmulationError, match="stop_unless"):
            cross_entropy_forward(logits, target, -100, 0.0)
        with pytest.raises(EmulationError, match="stop_unless"):
            cross_entropy_backward(logits, target, -100, 0.0, torch.zeros(2), torch.zeros(2))


def test_no_races() -> None:
    with driver.use(EmulatedDriver(races=True)):
        loss, _ = cross_entropy_forward(torch.zeros(2, 9001), torch.zeros(2, dtype=torch.int64), -100, 0.1)
    assert_close(loss, torch.full((2,), 9001.0).log(), 9001, depth=1)


def test_wrong_operands_are_named() -> None:
    target = torch.zeros(2, dtype=torch.int64)
    with driver.use(EMULATED), pytest.raises(TypeError, match=r"logits must be float32, .* got torch.float64"):
        cross_entropy_forward(torch.zeros(2, 5).double(), target, -100, 0.0)
    with pytest.raises(TypeError, match="logits must be on a cuda device, got cpu"):
        cross_entropy_forward(torch.zeros(2, 5), target, -100, 0.0)
