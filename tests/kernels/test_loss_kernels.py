"""Cross entropy of each row against torch's in float64, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sd_plugin.kernels import cross_entropy_backward, cross_entropy_forward

from ..tolerances import assert_close
from .cases import STRIDES, strided, tensor_of


@given(
    rows=st.integers(0, 6), columns=st.integers(1, 70), seed=st.integers(0, 10**6), how=STRIDES,
    smoothing=st.sampled_from([0.0, 0.1]), spread=st.sampled_from([1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_forward_and_backward(
    backend: str, device: str, rows: int, columns: int, seed: int, how: str, smoothing: float, spread: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    assume(not (backend == "cuda" and dtype == torch.float64))
    logits = (tensor_of(seed, rows, columns) * spread).to(dtype)
    target = torch.randint(-1, columns, (rows,), generator=torch.Generator().manual_seed(seed))
    scale = tensor_of(seed + 1, rows).to(dtype)
    exact = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        exact, target, ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(loss, exact, scale.double())

    on, target = strided(logits.to(device), how), target.to(device)
    got, lse = cross_entropy_forward(on, target, -1, smoothing)
    dlogits = cross_entropy_backward(on, target, -1, smoothing, lse, scale.to(device))

    assert got.dtype == dlogits.dtype == dtype
    # The exponential of a logit turns its rounding, which grows with it, into a share of the result.
    largest = max(1.0, float(exact.detach().abs().max())) if rows else 1.0
    of_scale = max(1.0, float(scale.abs().max())) if rows else 1.0
    assert_close(got, loss, columns, depth=2, magnitude=largest, exact=True)
    assert_close(dlogits, gradient, columns, depth=2, magnitude=largest * of_scale, exact=True)


@pytest.mark.parametrize("column", [0, 40])
def test_a_nan_is_not_hidden(backend: str, device: str, column: int) -> None:
    logits = torch.zeros(2, 41, device=device)
    logits[1, column] = float("nan")
    loss, _ = cross_entropy_forward(logits, torch.tensor([3, 3], device=device), -100, 0.0)
    assert loss.isnan().tolist() == [False, True]


def test_a_masked_column_costs_nothing(backend: str, device: str) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = -float("inf")
    target = torch.tensor([1, 2, 19])
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    loss, lse = cross_entropy_forward(logits.to(device), target.to(device), -100, 0.0)
    assert_close(loss.cpu(), expected, 20, depth=2, magnitude=10.0)
    gradient = cross_entropy_backward(logits.to(device), target.to(device), -100, 0.0, lse, torch.ones_like(loss))
    assert float(gradient[:, 7].abs().max()) < 1e-30


def test_bad_targets_and_shapes(backend: str, device: str) -> None:
    logits = torch.zeros(2, 5, device=device)
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds"):
        cross_entropy_forward(logits, torch.tensor([0, 5], device=device), -100, 0.0)
    with pytest.raises(IndexError, match=r"Target -1 is out of bounds"):
        cross_entropy_forward(logits, torch.tensor([-1, 0], device=device), -100, 0.0)
    with pytest.raises(ValueError, match=r"need logits \[R, V\] and target \[R\]"):
        cross_entropy_forward(logits, torch.zeros(3, dtype=torch.int64, device=device), -100, 0.0)
    with pytest.raises(ValueError, match="need at least one column"):
        cross_entropy_forward(logits[:, :0], torch.tensor([-100, -100], device=device), -100, 0.0)
    with pytest.raises(ValueError, match=r"scale must be \[2\]"):
        cross_entropy_backward(logits, torch.tensor([0, 1], device=device), -100, 0.0, logits[:, 0], logits[0])
    with pytest.raises(TypeError, match="target must be int64"):
        cross_entropy_forward(logits, torch.zeros(2, dtype=torch.int32, device=device), -100, 0.0)
