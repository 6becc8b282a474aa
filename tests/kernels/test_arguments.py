"""Operands that do not fit are refused before any backend sees them, in words that name the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sd_plugin.kernels import (
    BackendError,
    Kept,
    LSTMCall,
    LSTMResultGradients,
    Steps,
    gemm_bp,
    gemm_fp,
    gemm_wg,
    lstm_backward,
    lstm_forward,
    lstm_pack,
)

T, B, K, N, H = 3, 2, 4, 5, 6


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


GEMM = {
    gemm_fp: {"x": zeros(T, B, K), "weight_t": zeros(K, N)},
    gemm_bp: {"dy": zeros(T, B, N), "weight_t": zeros(K, N)},
    gemm_wg: {"x": zeros(T, B, K), "dy": zeros(T, B, N)},
}
PACK = {
    "weight_ih": zeros(4 * H, K), "weight_hh": zeros(4 * H, H), "bias_ih": zeros(4 * H),
    "bias_hh": zeros(4 * H),
}  # fmt: skip
STATE = {"h0": zeros(B, H), "c0": zeros(B, H)}
GRADIENTS = {"dy": zeros(T, B, H), "dh_n": zeros(B, H), "dc_n": zeros(B, H)}
KEPT_X = {
    "of other units": (Kept.all(T, K + 1), ValueError),
    "of other steps": (Kept.all(T + 1, K), ValueError),
    "elsewhere": (Kept.all(T, K, "meta"), TypeError),
}
PATTERN_H = {
    "of other units": (Kept.all(T, H - 1), ValueError),
    "of other steps": (Kept.all(T - 1, H), ValueError),
    "elsewhere": (Kept.all(T, H, "meta"), TypeError),
    "mask of other rows": (zeros(T, B + 1, H), ValueError),
    "mask of other steps": (zeros(T + 1, B, H), ValueError),
    "mask of other units": (zeros(T, B, 1), ValueError),
    "mask of other dtype": (zeros(T, B, H).double(), TypeError),
    "mask elsewhere": (torch.zeros(T, B, H, device="meta"), TypeError),
}


def refuses(function: Callable[..., Any], error: type[Exception], name: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=rf"\b{name}\b"):
        function(*args, **kwargs)


@pytest.mark.parametrize("product", GEMM, ids=lambda product: product.__name__)
def test_products_name_an_operand_that_does_not_fit(product: Callable[..., Any]) -> None:
    good = GEMM[product]
    product(**good)
    for name, tensor in good.items():
        refuses(product, ValueError, name, **{**good, name: tensor[0]})
        refuses(product, ValueError, name, **{**good, name: tensor.unsqueeze(0)})
    second = list(good)[1]
    refuses(product, TypeError, second, **{**good, second: good[second].double()})
    refuses(product, TypeError, second, **{**good, second: good[second].to("meta")})
    for kept, error in KEPT_X.values():
        refuses(product, error, "kept", **good, kept=kept)


def test_products_name_columns_that_do_not_fit() -> None:
    refuses(gemm_fp, ValueError, "x", zeros(T, B, K + 1), zeros(K, N))
    refuses(gemm_bp, ValueError, "dy", zeros(T, B, N + 1), zeros(K, N))
    refuses(gemm_wg, ValueError, "dy", zeros(T, B, K), zeros(T, B + 1, N))


def test_rows_must_be_as_the_batch_sizes_say() -> None:
    steps = Steps.packed([2, 1])
    refuses(gemm_fp, ValueError, "x", zeros(4, K), zeros(K, N), steps=steps)
    refuses(gemm_fp, ValueError, "x", zeros(T, B, K), zeros(K, N), steps=steps)
    refuses(gemm_bp, ValueError, "dy", zeros(2, N), zeros(K, N), steps=steps)
    refuses(gemm_wg, ValueError, "dy", zeros(3, K), zeros(4, N), steps=steps)


def test_products_are_of_floating_point_numbers() -> None:
    with pytest.raises(BackendError, match="int64"):
        gemm_fp(zeros(T, B, K).long(), zeros(K, N).long())


def test_packing_names_a_weight_that_does_not_fit() -> None:
    lstm_pack(**PACK)
    for shape in [(), (4 * H,), (4 * H, H + 1), (4 * H + 1, H), (1, 4 * H, H)]:
        refuses(lstm_pack, ValueError, "weight_hh", **{**PACK, "weight_hh": zeros(*shape)})
    for shape in [(4 * H,), (4 * H + 1, K), (1, 4 * H, K)]:
        refuses(lstm_pack, ValueError, "weight_ih", **{**PACK, "weight_ih": zeros(*shape)})
    for name in ("bias_ih", "bias_hh"):
        refuses(lstm_pack, ValueError, name, **{**PACK, name: zeros(4 * H, 1)})
        refuses(lstm_pack, ValueError, name, **{**PACK, name: zeros(H)})
    for name in ("weight_hh", "bias_ih", "bias_hh"):
        refuses(lstm_pack, TypeError, name, **{**PACK, name: PACK[name].double()})
        refuses(lstm_pack, TypeError, name, **{**PACK, name: PACK[name].to("meta")})


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_lstm_names_an_operand_that_does_not_fit(direction: str) -> None:
    packed, x = lstm_pack(**PACK), zeros(T, B, K)
    saved = lstm_forward(packed, x, tuple(STATE.values())).saved
    good = {"x": x, **(STATE if direction == "forward" else GRADIENTS)}

    def run(**changes: Any) -> None:
        tensors = {name: changes.pop(name, tensor) for name, tensor in good.items()}
        x, *others = tensors.values()
        if direction == "forward":
            lstm_forward(packed, x, tuple(others), LSTMCall(**changes))
        else:
            lstm_backward(packed, x, saved, LSTMResultGradients(*others), LSTMCall(**changes))

    run()
    for name, tensor in good.items():
        refuses(run, ValueError, name, **{name: tensor[0]})
        refuses(run, ValueError, name, **{name: tensor[..., 1:]})
        refuses(run, TypeError, name, **{name: tensor.double()})
        refuses(run, TypeError, name, **{name: tensor.to("meta")})
        if name != "x":
            refuses(run, ValueError, name, **{name: tensor[..., 1:, :]})
    for kept, error in KEPT_X.values():
        refuses(run, error, "input", input=kept)
    for pattern, error in PATTERN_H.values():
        refuses(run, error, "recurrent", recurrent=pattern)
    refuses(run, ValueError, "x", steps=Steps.packed([B] * T))


def test_patterns_and_layouts_check_themselves() -> None:
    indices = torch.zeros(T, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[T, k\]"):
        Kept(indices[0], 4)
    with pytest.raises(TypeError, match="int32"):
        Kept(indices.long(), 4)
    with pytest.raises(ValueError, match="2 units of 1"):
        Kept(indices.expand(T, 2), 1)
    with pytest.raises(ValueError, match="time steps"):
        Kept.concat([Kept.all(2, 3), Kept.all(3, 3)])
    with pytest.raises(ValueError, match="time_dim"):
        Steps(2)
    with pytest.raises(ValueError, match="batch_sizes"):
        Steps.packed([1, 2])
