"""The LSTM kernels against an LSTM written out row by row in float64, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sd_plugin.kernels import Kept, LSTMCall, LSTMResultGradients, Wanted, lstm_backward, lstm_forward, lstm_pack

from .. import truth
from ..tolerances import assert_close
from .cases import STRIDES, Layout, examples, kept_units, layouts, noise_of, strided, tensor_of, to_device

Dtypes = Callable[[str], list[torch.dtype]]


def recurrent_patterns(steps: int, batch: int, size: int) -> st.SearchStrategy[Kept | Tensor | None]:
    """Kept units, a dense multiplier, or nothing dropped."""
    masks = st.integers(0, 10**6).map(lambda seed: (noise_of(seed, steps, batch, size) < 0.5).double() * 2)
    return kept_units(steps, size) | masks


@settings(max_examples=examples(150))
@given(
    data=st.data(), layout=layouts(), n_in=st.integers(1, 6), hidden=st.integers(1, 6),
    seed=st.integers(0, 10**6), bias=st.booleans(), reverse=st.booleans(), how=STRIDES,
)  # fmt: skip
def test_forward_and_backward(
    backend: str, device: str, dtypes_of: Dtypes, data: st.DataObject, layout: Layout, n_in: int, hidden: int,
    seed: int, bias: bool, reverse: bool, how: str,
) -> None:  # fmt: skip
    dtype = data.draw(st.sampled_from(dtypes_of("lstm")))
    kept_x = data.draw(kept_units(layout.count, n_in))
    pattern_h = data.draw(recurrent_patterns(layout.count, layout.batch, hidden))
    count, batch = layout.count, layout.batch
    names = {
        "x": (count, batch, n_in), "h0": (batch, hidden), "c0": (batch, hidden),
        "weight_ih": (4 * hidden, n_in), "weight_hh": (4 * hidden, hidden),
        "bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,),
        "dy": (count, batch, hidden), "dh_n": (batch, hidden), "dc_n": (batch, hidden),
    }  # fmt: skip
    # Values that the low-precision dtypes hold exactly: what is measured is the kernels' own rounding.
    low = {name: (tensor_of(seed + i, *shape) * 0.7).to(dtype) for i, (name, shape) in enumerate(names.items())}
    high = {name: tensor.detach().clone().double().requires_grad_() for name, tensor in low.items()}
    high["gates"] = torch.zeros(count, batch, 4 * hidden, dtype=torch.float64, requires_grad=True)

    drop_x = truth.multiplier(kept_x, count, batch, n_in, torch.float64)
    drop_h = truth.multiplier(pattern_h, count, batch, hidden, torch.float64)
    biases = (high["bias_ih"], high["bias_hh"]) if bias else (None, None)
    y, h_n, c_n = truth.lstm_layer(
        high["x"] * drop_x, high["h0"], high["c0"], (high["weight_ih"], high["weight_hh"], *biases), drop_h,
        list(layout.lengths), reverse, high["gates"],
    )  # fmt: skip
    loss = (y * high["dy"]).sum() + (h_n * high["dh_n"]).sum() + (c_n * high["dc_n"]).sum()
    wanted = ["x", "gates", "h0", "c0", "weight_ih", "weight_hh", *(["bias_ih"] if bias else [])]
    grads = torch.autograd.grad(loss, [high[name] for name in wanted], materialize_grads=True)

    on = {name: tensor.to(device) for name, tensor in low.items()}
    kept_on = to_device(kept_x, device)
    pattern_on = pattern_h.to(device, dtype) if isinstance(pattern_h, Tensor) else to_device(pattern_h, device)
    x = strided(layout.from_padded(on["x"]), how)
    dy = strided(layout.from_padded(on["dy"]), how)
    packed = lstm_pack(on["weight_ih"], on["weight_hh"], *((on["bias_ih"], on["bias_hh"]) if bias else (None, None)))
    call = LSTMCall(kept_on, pattern_on, layout.steps, reverse)
    result = lstm_forward(packed, x, (on["h0"], on["c0"]), call)
    gradients = LSTMResultGradients(dy, on["dh_n"], on["dc_n"])
    got = lstm_backward(packed, x, result.saved, gradients, call, Wanted(gates=True))

    expected = {"y": layout.from_padded(y), "h_n": h_n, "c_n": c_n}
    expected |= {name: layout.from_padded(grad) for name, grad in zip(wanted[:2], grads, strict=False)}
    expected |= dict(zip(wanted[2:], grads[2:], strict=True))
    for name, value in expected.items():
        found = getattr(result if name in ("y", "h_n", "c_n") else got, "bias" if "bias" in name else name)
        assert found.dtype == dtype
        # A step is a sum for the gates and one for the gradients, and so is what is taken over all steps.
        assert_close(found, value, n_in + 4 * hidden, depth=2 * (count + 1), exact=True, name=name)


@pytest.mark.parametrize("reverse", [False, True])
def test_rounding_is_that_of_torch(backend: str, device: str, dtypes_of: Dtypes, reverse: bool) -> None:
    """Over many steps in float32, errors stay about those of ``nn.LSTM``."""
    if torch.float32 not in dtypes_of("lstm"):
        pytest.skip("no float32")
    torch.manual_seed(0)
    stock = nn.LSTM(24, 32)
    x = torch.randn(60, 5, 24, requires_grad=True)
    weights = (stock.weight_ih_l0, stock.weight_hh_l0, stock.bias_ih_l0, stock.bias_hh_l0)
    zeros = torch.zeros(5, 32)
    dy = torch.randn(60, 5, 32)

    doubled = [tensor.detach().double().requires_grad_() for tensor in (x, *weights)]
    exact, *_ = truth.lstm_layer(
        doubled[0], zeros.double(), zeros.double(), tuple(doubled[1:]), torch.ones(60, 5, 32).double(),
        [60] * 5, reverse,
    )  # fmt: skip
    wanted = [exact, *torch.autograd.grad((exact * dy).sum(), doubled[:4])]
    y, _ = stock(x.flip(0) if reverse else x)
    y = y.flip(0) if reverse else y
    theirs = [y, *torch.autograd.grad((y * dy).sum(), [x, *weights[:3]])]

    with torch.no_grad():
        packed = lstm_pack(*(weight.to(device) for weight in weights))
        zero, call = zeros.to(device), LSTMCall(reverse=reverse)
        result = lstm_forward(packed, x.to(device), (zero, zero), call)
        gradients = LSTMResultGradients(dy.to(device), zero, zero)
        grads = lstm_backward(packed, x.to(device), result.saved, gradients, call)
    ours = [result.y, grads.x, grads.weight_ih, grads.weight_hh, grads.bias]

    for got, stocks, right in zip(ours, theirs, wanted, strict=True):
        error = (got.cpu().double() - right).norm() / right.norm()
        stock_error = (stocks.double() - right).norm() / right.norm()
        assert error <= 3 * stock_error + torch.finfo(torch.float32).eps


def test_emitted_state_is_undropped(backend: str, device: str) -> None:
    """The recurrent pattern acts inside the product: no unit of ``h_t`` or ``c_t`` is zeroed or scaled."""
    torch.manual_seed(0)
    weights = [torch.randn(16, 3, device=device), torch.randn(16, 4, device=device)]
    kept = Kept(torch.tensor([[0], [1], [2]], dtype=torch.int32, device=device), 4, 4.0)
    state = torch.zeros(2, 4, device=device)
    x = torch.randn(3, 2, 3, device=device)

    result = lstm_forward(lstm_pack(*weights), x, (state, state), LSTMCall(recurrent=kept))

    assert bool((result.y != 0).all())
    assert bool((result.y.abs() < 1).all()), "an LSTM's output is a product of a sigmoid and a tanh"
    assert torch.equal(result.y[-1], result.h_n)


def test_packed_weights_are_a_snapshot(backend: str, device: str) -> None:
    torch.manual_seed(0)
    weights = [
        torch.randn(8, 3, device=device),
        torch.randn(8, 2, device=device),
        torch.randn(8, device=device),
    ]
    x, state = torch.randn(2, 2, 3, device=device), torch.zeros(2, 2, device=device)
    packed = lstm_pack(*weights)
    before = lstm_forward(packed, x, (state, state)).y
    for weight in weights:
        weight.zero_()
    assert torch.equal(lstm_forward(packed, x, (state, state)).y, before)
    assert bool((state == 0).all()), "initial states are not written to"
