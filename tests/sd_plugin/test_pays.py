"""What is too small to gain from skipping is left to torch, and said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sd_plugin import StructuredDropout, StructuredLinear, _check, _pays, stats
from sd_plugin._environment import read_skip_from

ROWS, UNITS, COLUMNS = 6, 8, 5


@pytest.fixture(autouse=True)
def as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pays, "ASKED_FOR", None)


def run(layer: StructuredLinear) -> list[Tensor]:
    """Result and gradients of a training step of dropout and a linear layer."""
    torch.manual_seed(1)
    source = torch.randn(3, ROWS // 3, UNITS, dtype=torch.float64, requires_grad=True)
    y = layer(StructuredDropout(0.5)(source))
    return [y, *torch.autograd.grad(y.square().sum(), [source, *layer.parameters()])]


def test_a_small_product_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = StructuredLinear(UNITS, COLUMNS, dtype=torch.float64)
    small = run(layer)
    site = stats.sites()["dropout"]
    assert (site.drawn, site.waived, site.lost, site.dense) == (1, 1, 0, 0)
    assert "products of linear layers, too small to gain from skipping (8 units): 1" in stats.report()
    monkeypatch.setattr(_pays, "ON_CPU", ROWS * UNITS * COLUMNS)
    torch.testing.assert_close(run(layer), small)
    assert site.skipped > 0
    assert site.lost == 0
    monkeypatch.setattr(_pays, "ON_CPU", ROWS * UNITS * COLUMNS + 1)
    run(layer)
    assert (site.drawn, site.waived) == (3, 2)


def test_what_only_a_small_product_has_left_out_can_be_used_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    x = StructuredDropout(0.5)(torch.randn(3, 2, UNITS))
    small, large = StructuredLinear(UNITS, COLUMNS), StructuredLinear(UNITS, 2 * COLUMNS)
    monkeypatch.setattr(_pays, "ON_CPU", ROWS * UNITS * COLUMNS + 1)
    site = stats.sites()["dropout"]
    counts = []
    for layer in (small, large, small):
        layer(x)
        counts.append((site.drawn, site.used, site.waived, site.lost))
    assert counts == [(1, 0, 1, 0), (1, 1, 0, 0), (1, 1, 0, 0)]


def test_who_asks_for_a_check_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "ENABLED", True)
    run(StructuredLinear(UNITS, COLUMNS, dtype=torch.float64))
    assert stats.sites()["dropout"].skipped > 0


def test_devices_that_nobody_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, other = torch.device("cpu"), torch.device("cuda")
    assert _pays.product_pays(1, other)
    assert not _pays.step_pays(10**15, other)
    for pays in (_pays.product_pays, _pays.step_pays):
        assert pays(_pays.ON_CPU, cpu)
        assert not pays(_pays.ON_CPU - 1, cpu)
        with monkeypatch.context() as patched:
            patched.setattr(_pays, "ASKED_FOR", 7)
            assert [pays(size, device) for device in (cpu, other) for size in (6, 7)] == [False, True] * 2


@pytest.mark.parametrize(("text", "value"), [("", None), (" 0 ", 0), ("96000000", 96_000_000)])
def test_the_variable_is_a_number(text: str, value: int | None) -> None:
    assert read_skip_from({"SD_PLUGIN_SKIP_FROM": text}) == value
    assert read_skip_from({}) is None


@pytest.mark.parametrize("text", ["-1", "1e6", "many", "9" * 5000, "\u0663"])
def test_another_value_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number of multiply-adds") as caught:
        read_skip_from({"SD_PLUGIN_SKIP_FROM": text})
    assert len(str(caught.value)) < 150


def test_a_program_goes_on_without_a_value_that_is_none() -> None:
    program = "from sd_plugin import _pays; assert _pays.ASKED_FOR is None"
    environ = {**os.environ, "SD_PLUGIN_SKIP_FROM": "many"}
    found = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert "SD_PLUGIN_SKIP_FROM='many' must be a whole number" in found.stderr
    assert "it is ignored" in found.stderr
