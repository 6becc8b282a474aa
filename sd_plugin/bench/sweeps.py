"""One LSTM layer, forward and backward, against one of p, H, B and T at a time, from Zaremba-medium's shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import phases
from .columns import DENSE, NR_RH_ST, STOCK
from .layers import lstm
from .timing import Clock
from .workload import Setup, layer_products

if TYPE_CHECKING:
    from torch import Tensor

#: nn.LSTM, ours with nothing skipped, and both directions structured.
COLUMNS = (STOCK, DENSE, NR_RH_ST)


@dataclass(frozen=True)
class Point:
    """A layer of ``H`` units and as many inputs, on ``T`` steps of ``B`` rows, with dropout ``p`` everywhere."""

    p: float = 0.5
    H: int = 650
    B: int = 20
    T: int = 35


BASE = Point()
AXES: dict[str, tuple[float, ...]] = {
    "p": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "H": (256, 512, 1024, 1536, 2048),
    "B": (1, 4, 16, 32, 64, 128),
    "T": (5, 10, 35, 70, 140),
}
_TINY_BASE = Point(H=16, B=3, T=4)
_TINY_AXES: dict[str, tuple[float, ...]] = {"p": (0.0, 0.5), "H": (8, 16), "B": (1, 3), "T": (2, 4)}


def points(setup: Setup) -> Iterator[tuple[str, float, Point]]:
    """Axis, value on it, and the layer, for all of the sweeps."""
    base, axes = (_TINY_BASE, _TINY_AXES) if setup.tiny else (BASE, AXES)
    for axis, values in axes.items():
        for value in values:
            changed: dict[str, Any] = {axis: value}
            yield axis, value, replace(base, **changed)


class _Layer:
    """The layer of one column, its input's dropout included; called, it runs forward and backward."""

    def __init__(self, column: str, point: Point, setup: Setup) -> None:
        structured: dict[str, Any] = {"input_dropout": point.p} if column == NR_RH_ST else {}
        self._dropout = nn.Identity() if structured else nn.Dropout(point.p)
        layer = lstm(column, point.H, point.H, recurrent_dropout=point.p, **structured)
        self._lstm = layer.to(setup.device)
        self._x, self._gradient = torch.randn(2, point.T, point.B, point.H, generator=setup.generator()).to(
            setup.device
        )
        self._x.requires_grad_()
        self._autocast = setup.autocast

    def __call__(self) -> Tensor:
        self._lstm.zero_grad()
        self._x.grad = None
        with self._autocast():
            y: Tensor = self._lstm(self._dropout(self._x))[0]
        y.backward(self._gradient.to(y.dtype))
        return y.detach()


def measure(axis: str, value: float, point: Point, columns: Sequence[str], setup: Setup, clock: Clock) -> Any:
    """Time one point: the layer, and its products.

    Returns:
        For the JSON file: the point, ``layer_ms`` by column, and the products as :func:`.phases.measure` gives them.
    """
    torch.manual_seed(setup.seed)
    wanted = [column for column in COLUMNS if column in columns]
    layers = {column: _Layer(column, point, setup) for column in wanted}
    timed = clock.loop(layers)
    p = {NR_RH_ST: point.p}
    products = layer_products("layer", (point.B,) * point.T, (point.H, point.H), p, p)
    return {
        "axis": axis,
        "value": value,
        **asdict(point),
        "layer_ms": timed,
        "products": [phases.measure(product, wanted, setup, clock) for product in products],
    }
