"""The three sparse products against a dense float64 product of zeroed and scaled operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin.kernels import Kept, Steps, gemm_bp, gemm_fp, gemm_wg

from ..tolerances import assert_close, partial_sums
from .cases import STRIDES, Layout, examples, kept_units, layouts, strided, tensor_of, to_device

Dtypes = Callable[[str], list[torch.dtype]]
SEEDS = st.integers(0, 10**6)
SIZES = st.integers(1, 9)


def factors(kept: Kept | None, layout: Layout, size: int) -> Tensor:
    """What each element of an activation counts: a dense ``[rows, size]`` multiplier."""
    if kept is None:
        return torch.ones(layout.rows(size), dtype=torch.float64)
    return kept.multiplier(torch.float64)[layout.step_of_row]


@settings(max_examples=examples(120))
@given(data=st.data(), layout=layouts(), k=SIZES, n=SIZES, seed=SEEDS, how=st.tuples(STRIDES, STRIDES))
def test_forward_product(
    backend: str, device: str, dtypes_of: Dtypes, data: st.DataObject, layout: Layout, k: int, n: int,
    seed: int, how: tuple[str, str],
) -> None:  # fmt: skip
    dtype = data.draw(st.sampled_from(dtypes_of("gemm_fp")))
    kept = data.draw(kept_units(layout.count, k))
    x, weight_t = tensor_of(seed, *layout.rows(k)).to(dtype), tensor_of(seed + 1, k, n).to(dtype)
    factor = factors(kept, layout, k)
    dropped = x.double() * factor
    # What is in a dropped column does not count, not even when a product with zero would not hide it.
    x = torch.where(factor != 0, x, float("nan"))

    y = gemm_fp(
        strided(x.to(device), how[0]),
        strided(weight_t.to(device), how[1]),
        to_device(kept, device),
        layout.steps,
    )

    assert y.dtype == dtype
    sums = partial_sums(dropped, weight_t)
    assert_close(y, dropped @ weight_t.double(), k + 1, depth=1, magnitude=sums, exact=True)


@settings(max_examples=examples(120))
@given(data=st.data(), layout=layouts(), k=SIZES, n=SIZES, seed=SEEDS, how=st.tuples(STRIDES, STRIDES))
def test_backward_product(
    backend: str, device: str, dtypes_of: Dtypes, data: st.DataObject, layout: Layout, k: int, n: int,
    seed: int, how: tuple[str, str],
) -> None:  # fmt: skip
    dtype = data.draw(st.sampled_from(dtypes_of("gemm_bp")))
    kept = data.draw(kept_units(layout.count, k))
    dy, weight_t = tensor_of(seed, *layout.rows(n)).to(dtype), tensor_of(seed + 1, k, n).to(dtype)
    factor = factors(kept, layout, k)

    dx = gemm_bp(
        strided(dy.to(device), how[0]),
        strided(weight_t.to(device), how[1]),
        to_device(kept, device),
        layout.steps,
    )

    assert dx.dtype == dtype
    assert bool((dx.cpu()[factor == 0] == 0).all()), "the gradient of a dropped column is exactly zero"
    truth = dy.double() @ weight_t.double().t() * factor
    assert_close(dx, truth, n + 1, depth=1, magnitude=partial_sums(dy, weight_t.t()) * factor, exact=True)


@settings(max_examples=examples(120))
@given(data=st.data(), layout=layouts(), k=SIZES, n=SIZES, seed=SEEDS, how=st.tuples(STRIDES, STRIDES))
def test_weight_gradient_product(
    backend: str, device: str, dtypes_of: Dtypes, data: st.DataObject, layout: Layout, k: int, n: int,
    seed: int, how: tuple[str, str],
) -> None:  # fmt: skip
    dtype = data.draw(st.sampled_from(dtypes_of("gemm_wg")))
    kept = data.draw(kept_units(layout.count, k))
    x, dy = tensor_of(seed, *layout.rows(k)).to(dtype), tensor_of(seed + 1, *layout.rows(n)).to(dtype)
    factor = factors(kept, layout, k)
    dropped = (x.double() * factor).reshape(-1, k)
    rows = dy.double().reshape(-1, n)
    x = torch.where(factor != 0, x, float("nan"))

    dweight_t = gemm_wg(
        strided(x.to(device), how[0]), strided(dy.to(device), how[1]), to_device(kept, device), layout.steps
    )

    assert dweight_t.dtype == dtype
    sums = partial_sums(dropped.t(), rows)
    assert_close(dweight_t, dropped.t() @ rows, rows.shape[0] + 1, depth=1, magnitude=sums, exact=True)


@pytest.mark.parametrize("product", ["bp", "wg"])
def test_an_overflow_in_dy_stays_in_kept_units(
    backend: str, device: str, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where cuBLAS multiplies zeros instead of leaving units out, zero times infinity is not a number, as in torch.
    monkeypatch.setenv("SD_PLUGIN_CUDA_PRODUCTS", "skip")
    # Padding stands for no unit: it must not turn an infinite gradient into nan elsewhere.
    kept = Kept(torch.tensor([[1, 4, 4], [4, 4, 4]], dtype=torch.int32, device=device), 4, 1.0, padded=True)
    dy = torch.full((2, 1, 2), float("inf"), device=device)
    if product == "bp":
        out = gemm_bp(dy, torch.ones(4, 2, device=device), kept)
        assert out[:, 0].tolist() == [[0, float("inf"), 0, 0], [0, 0, 0, 0]]
    else:
        out = gemm_wg(torch.ones(2, 1, 4, device=device), dy, kept)
        assert out.tolist() == [[0, 0], [float("inf")] * 2, [0, 0], [0, 0]]


@given(layout=layouts(), data=st.data(), seed=SEEDS)
def test_padding_and_scale_are_only_notation(
    backend: str, device: str, dtypes_of: Dtypes, layout: Layout, data: st.DataObject, seed: int
) -> None:
    """The same units, padded or not, scaled in the pattern or in the tensor, are the same product."""
    dtype = dtypes_of("gemm_fp")[0]
    size = 6
    k = data.draw(st.integers(1, size))
    chosen = tensor_of(seed, layout.count, size).argsort(1)[:, :k].sort(1).values.int().to(device)
    kept = Kept(chosen, size, 2.0)
    filling = chosen.new_full((layout.count, size - k), size)
    padded = Kept(torch.cat([chosen, filling], 1), size, 2.0, padded=True)
    x = tensor_of(seed + 1, *layout.rows(size)).to(device, dtype)
    weight_t = tensor_of(seed + 2, size, 3).to(device, dtype)

    y = gemm_fp(x, weight_t, kept, layout.steps)

    assert_close(gemm_fp(x, weight_t, padded, layout.steps), y, size, depth=1, magnitude=20.0)
    assert_close(gemm_fp(x * 2, weight_t, kept.unscaled(), layout.steps), y, size, depth=1, magnitude=20.0)


@pytest.mark.parametrize("units", [[[2, 1]], [[1, 1]], [[-1, 2]], [[9, 2]]])
def test_kept_units_that_do_not_ascend_are_refused(backend: str, device: str, units: list[list[int]]) -> None:
    if backend == "reference":
        pytest.skip("it indexes by them as they are")
    if backend == "cuda":
        pytest.skip("to look at them would be to wait for the device; see test_cuda_gemm.py")
    kept = Kept(torch.tensor(units, dtype=torch.int32, device=device), 4)
    with pytest.raises(ValueError, match="strictly ascending"):
        gemm_fp(torch.ones(1, 2, 4, device=device), torch.ones(4, 3, device=device), kept)


def test_operands_are_not_changed(backend: str, device: str) -> None:
    x, weight_t = torch.ones(2, 3, 4, device=device), torch.ones(4, 5, device=device)
    dy, kept = torch.ones(2, 3, 5, device=device), Kept.all(2, 4, device)
    gemm_fp(x, weight_t, kept)
    gemm_bp(dy, weight_t, kept)
    gemm_wg(x, dy, kept)
    assert all(bool((tensor == 1).all()) for tensor in (x, weight_t, dy))


def test_a_step_may_have_no_rows(backend: str, device: str) -> None:
    kept = Kept(torch.tensor([[0], [1], [0]], dtype=torch.int32, device=device), 2, 2.0)
    x, weight_t = torch.ones(3, 2, device=device), torch.eye(2, device=device)
    assert gemm_fp(x, weight_t, kept, Steps.packed([2, 1, 0])).tolist() == [[2, 0], [2, 0], [0, 2]]
