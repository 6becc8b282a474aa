"""``SD_PLUGIN_CHECK=1``: what torch tells nobody about a dropped tensor is found at the next use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_plugin import StackedStructuredLSTM, StructuredDropout, StructuredDropoutLSTM, StructuredLinear, _check, hints
from sd_plugin._check import CheckError
from sd_plugin._environment import read_check
from sd_plugin.attentional import attentional_decoder
from sd_plugin.cell import SteppedDropout
from sd_plugin.kernels import TIME_MAJOR, Kept
from sd_plugin.patterns import draw_kept

from ..forks import Forks

np = pytest.importorskip("numpy")
STEPS, BATCH, UNITS = 3, 2, 6


@pytest.fixture(autouse=True)
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "ENABLED", True)


def _numpy(x: Tensor) -> None:
    x.detach().numpy()[:] = 1


def _asarray(x: Tensor) -> None:
    np.asarray(x.detach())[0, 0] += 1


def _dlpack(x: Tensor) -> None:
    np.from_dlpack(x.detach())  # which may be read-only
    torch.from_dlpack(x.detach()).fill_(1)


def _storage(x: Tensor) -> None:
    torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).fill_(1)


def _data(x: Tensor) -> None:
    x.data.add_(1)


WRITES: dict[str, Callable[[Tensor], None]] = {
    "numpy": _numpy, "asarray": _asarray, "dlpack": _dlpack, "storage": _storage, "data": _data,
}  # fmt: skip


def product(kind: str) -> Callable[[Tensor], Tensor]:
    """What multiplies a dropped ``[T, B, K]``, or batch-first for the decoder."""
    if kind == "linear":
        return StructuredLinear(UNITS, 4)
    if kind == "view":
        linear = StructuredLinear(UNITS, 4)
        return lambda x: linear(x.view(-1, UNITS))
    if kind == "lstm":
        lstm = StructuredDropoutLSTM(UNITS, 4, recurrent_dropout=0.5)
        return lambda x: lstm(x)[0]
    if kind == "cells":
        cells = StackedStructuredLSTM(1, UNITS + 1, 4, recurrent_dropout=0.5)

        def steps(x: Tensor) -> Tensor:
            run, state = cells.start(STEPS, BATCH, x), (x.new_zeros(1, BATCH, 4), x.new_zeros(1, BATCH, 4))
            for t, row in enumerate(hints.unbind(x, TIME_MAJOR)):
                y, state = run.step(t, hints.cat([row, x.new_ones(BATCH, 1)]), state)
            return y

        return steps
    stack, join = StackedStructuredLSTM(1, UNITS + 4, 4), torch.randn(4, 8, requires_grad=True)

    def decode(x: Tensor) -> Tensor:
        state, lengths = (x.new_zeros(1, BATCH, 4), x.new_zeros(1, BATCH, 4)), torch.full((BATCH,), 5).int()
        drop = SteppedDropout(draw_kept(STEPS, 4, 0.5), "output")
        run, feed = stack.start(STEPS, BATCH, x), x.new_zeros(BATCH, 4)
        return attentional_decoder(run, x, torch.randn(BATCH, 5, 4), lengths, state, feed, drop, None, join)[0]

    return decode


PRODUCTS = ["linear", "view", "lstm", "cells", "decoder"]


def dropped(kind: str, source: Tensor | None = None) -> Tensor:
    batch_first = kind == "decoder"
    shape = (BATCH, STEPS, UNITS) if batch_first else (STEPS, BATCH, UNITS)
    source = torch.rand(shape) + 1 if source is None else source
    return StructuredDropout(0.5, batch_first=batch_first, site="here")(source.requires_grad_())


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_between_dropout_and_product_is_found(write: Callable[[Tensor], None], kind: str) -> None:
    run, x = product(kind), dropped(kind)
    run(x).sum().backward()
    write(x)
    with pytest.raises(CheckError, match=r"SD_PLUGIN_CHECK: here: \d+ values of dropped units are not zero") as caught:
        run(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["linear", "view", "lstm", "decoder"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_between_product_and_backward_is_found(write: Callable[[Tensor], None], kind: str) -> None:
    run, x = product(kind), dropped(kind)
    y = run(x)
    write(x)
    with pytest.raises(CheckError, match=r"here: .* are not zero at the backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_values_that_are_not_finite_are_found_where_they_are_dropped(kind: str, value: float) -> None:
    with pytest.raises(CheckError, match=r"here: .* dropped units are nan or infinite after the dropout"):
        dropped(kind, torch.full((BATCH, STEPS, UNITS) if kind == "decoder" else (STEPS, BATCH, UNITS), value))


def test_a_gradient_is_what_it_is_without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in PRODUCTS:
        torch.manual_seed(0)
        run = product(kind)
        results = []
        for enabled in (True, False):
            monkeypatch.setattr(_check, "ENABLED", enabled)
            torch.manual_seed(1)
            source = torch.rand(BATCH if kind == "decoder" else STEPS, STEPS if kind == "decoder" else BATCH, UNITS)
            y = run(dropped(kind, source))
            y.sum().backward()
            results.append((y.detach(), source.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("indices", [[[2, 1]], [[1, 1]], [[0, 6]], [[-1, 2]]])
def test_kept_units_out_of_order_are_found(indices: list[list[int]]) -> None:
    with pytest.raises(CheckError, match="there: kept units of a step do not ascend from 0 to 5"):
        hints.Draw("there", Kept(torch.tensor(indices, dtype=torch.int32), UNITS))
    hints.Draw("there", Kept(torch.tensor([[0, 2], [5, 6], [6, 6]], dtype=torch.int32), UNITS, padded=True))


def test_without_the_switch_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "ENABLED", False)
    monkeypatch.setattr(_check, "check_zeros", None)
    x = dropped("linear")
    _data(x)
    product("linear")(x).sum().backward()


@pytest.mark.parametrize(("text", "value"), [("", False), ("0", False), ("off", False), ("1", True), (" On ", True)])
def test_the_variable(text: str, value: bool) -> None:
    assert read_check({"SD_PLUGIN_CHECK": text}) is value


def test_a_program_with_the_variable_set(fork: Forks) -> None:
    program = (
        "import torch, sd_plugin\n"
        "x = sd_plugin.StructuredDropout(0.5, site='mine')(torch.ones(3, 2, 6))\n"
        "x.data.add_(1)\n"
        "sd_plugin.StructuredLinear(6, 2)(x)\n"
    )

    def run(value: str) -> Any:
        return fork("-c", [program], cwd=Path.cwd(), env={**os.environ, "SD_PLUGIN_CHECK": value})

    assert run("0").returncode == 0
    found = run("1")
    assert found.returncode != 0 and "SD_PLUGIN_CHECK: mine: 18 values of dropped units" in found.stderr
    found = run("perhaps")
    assert found.returncode != 0
    assert "SD_PLUGIN_CHECK='perhaps' is not understood; valid: 0, off, false, no, 1, on" in found.stderr
