"""Shapes around and beyond the tiles, panels and blocks of the compiled backends, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin.kernels import (
    Kept,
    LSTMCall,
    LSTMResultGradients,
    Steps,
    gemm_bp,
    gemm_fp,
    gemm_pack,
    gemm_wg,
    lstm_backward,
    lstm_forward,
    lstm_pack,
)

from .. import truth
from ..tolerances import assert_close, partial_sums
from .cases import tensor_of

#: One less than, exactly, and one more than what fits registers, vectors, panels and blocks of panels.
SIZES = st.sampled_from([1, 3, 4, 6, 7, 15, 16, 17, 31, 33, 63, 64, 65, 129, 200])
COLUMNS = st.sampled_from([1, 16, 63, 64, 65, 130, 1023, 1024, 1025, 2100])
ROWS = st.sampled_from([1, 2, 4, 5, 13, 14, 15, 20, 29, 70])
DTYPES = st.sampled_from([torch.float32, torch.float64])


def skip_unless_done(backend: str, dtype: torch.dtype) -> None:
    """Leaves the example out where the backend does not do ``dtype``."""
    assume(not (backend == "cuda" and dtype == torch.float64))


def kept_of(seed: int, steps: int, size: int, share: float) -> Kept:
    """Kept units, about ``share`` of them."""
    k = max(1, round(size * share))
    return Kept(tensor_of(seed, steps, size).argsort(1)[:, :k].sort(1).values.int(), size, size / k)


@settings(max_examples=60)
@given(
    units=SIZES, columns=COLUMNS, rows=ROWS, steps=st.integers(1, 3), share=st.sampled_from([0.0, 0.35, 0.7, 1.0]),
    dense=st.booleans(), time_dim=st.integers(0, 1), dtype=DTYPES, seed=st.integers(0, 10**6),
)  # fmt: skip
def test_products(
    backend: str, device: str, units: int, columns: int, rows: int, steps: int, share: float, dense: bool,
    time_dim: int, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    skip_unless_done(backend, dtype)
    kept = None if dense else kept_of(seed, steps, units, share)
    factor = torch.ones(steps, 1, units) if kept is None else kept.multiplier(torch.float64).unsqueeze(1)
    shape = (steps, rows) if time_dim == 0 else (rows, steps)
    factor = factor if time_dim == 0 else factor.transpose(0, 1)
    x, dy = tensor_of(seed + 1, *shape, units).to(dtype), tensor_of(seed + 2, *shape, columns).to(dtype)
    weight, bias = tensor_of(seed + 3, columns, units).to(dtype), tensor_of(seed + 4, columns).to(dtype)
    layout = Steps(time_dim)
    on = None if kept is None else Kept(kept.indices.to(device), units, kept.scale)
    packed = gemm_pack(weight.to(device).t())
    dropped = x.double() * factor

    y = gemm_fp(x.to(device), packed, on, layout, bias.to(device))
    sums = partial_sums(dropped, weight.t()) + bias.double().abs()
    assert_close(y, dropped @ weight.double().t() + bias.double(), units + 2, depth=1, magnitude=sums, exact=True)
    dx = gemm_bp(dy.to(device), packed, on, layout)
    sums = partial_sums(dy, weight) * factor
    assert_close(dx, dy.double() @ weight.double() * factor, columns + 1, depth=1, magnitude=sums, exact=True)
    dweight_t = gemm_wg(x.to(device), dy.to(device), on, layout)
    dropped, gradient = dropped.flatten(0, 1).t(), dy.double().flatten(0, 1)
    sums = partial_sums(dropped, gradient)
    assert_close(dweight_t, dropped @ gradient, steps * rows + 1, depth=1, magnitude=sums, exact=True)


@settings(max_examples=25)
@given(
    inputs=SIZES,
    hidden=st.sampled_from([1, 7, 8, 15, 16, 17, 40, 65, 270]),
    rows=st.sampled_from([1, 3, 5, 14, 15, 20]),
    steps=st.integers(1, 4),
    reverse=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 10**6),
)
def test_layers(
    backend: str, device: str, inputs: int, hidden: int, rows: int, steps: int, reverse: bool, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    skip_unless_done(backend, dtype)
    shapes = {
        "x": (steps, rows, inputs), "h0": (rows, hidden), "c0": (rows, hidden), "weight_ih": (4 * hidden, inputs),
        "weight_hh": (4 * hidden, hidden), "bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,),
        "dy": (steps, rows, hidden),
    }  # fmt: skip
    # As a layer is initialized: saturated gates would hide errors.
    scales = {"x": 1.0, "dy": 1.0, "h0": 0.5, "c0": 0.5}
    low = {
        name: (tensor_of(seed + i, *shape) * scales.get(name, max(inputs, hidden) ** -0.5)).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    kept_x, kept_h = kept_of(seed, steps, inputs, 0.6), kept_of(seed + 9, steps, hidden, 0.4)
    high = {name: tensor.detach().clone().double().requires_grad_() for name, tensor in low.items()}
    drops = [truth.multiplier(kept, steps, rows, kept.size, torch.float64) for kept in (kept_x, kept_h)]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    y, _, _ = truth.lstm_layer(
        high["x"] * drops[0], high["h0"], high["c0"], tuple(high[name] for name in names), drops[1], [steps] * rows,
        reverse,
    )  # fmt: skip
    wanted = ["x", "h0", "c0", "weight_ih", "weight_hh"]
    grads = torch.autograd.grad((y * high["dy"]).sum(), [high[name] for name in wanted])

    on = {name: tensor.to(device) for name, tensor in low.items()}
    patterns = [Kept(kept.indices.to(device), kept.size, kept.scale) for kept in (kept_x, kept_h)]
    packed = lstm_pack(*(on[name] for name in names))
    call = LSTMCall(*patterns, reverse=reverse)
    result = lstm_forward(packed, on["x"], (on["h0"], on["c0"]), call)
    zeros = torch.zeros_like(on["h0"])
    got = lstm_backward(packed, on["x"], result.saved, LSTMResultGradients(on["dy"], zeros, zeros), call)
    terms, depth = max(inputs + hidden, 4 * hidden, steps * rows), 2 * (steps + 1)
    assert_close(result.y, y, terms, depth, exact=True)
    for name, grad in zip(wanted, grads, strict=True):
        assert_close(getattr(got, name), grad, terms, depth, exact=True, name=name)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(backend: str, device: str, threads: int) -> None:
    if backend != "cpu":
        pytest.skip("it has no threads of its own")
    x, weight = tensor_of(0, 3, 20, 70).float(), tensor_of(1, 4 * 50, 70).float() * 0.1
    recurrent, kept = tensor_of(2, 200, 50).float() * 0.1, kept_of(3, 3, 50, 0.5)
    zeros, dy = torch.zeros(20, 50), tensor_of(4, 3, 20, 50).float()

    def run() -> list[Tensor]:
        packed = lstm_pack(weight, recurrent)
        call = LSTMCall(recurrent=kept)
        result = lstm_forward(packed, x, (zeros, zeros), call)
        grads = lstm_backward(packed, x, result.saved, LSTMResultGradients(dy, zeros, zeros), call)
        return [result.y, grads.x, grads.weight_ih, grads.weight_hh, grads.bias]  # type: ignore[list-item]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(before)
