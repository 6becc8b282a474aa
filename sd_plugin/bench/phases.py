"""The three products (FP, BP, WG) of a workload's weight matrices by themselves: torch, ours dense, ours skipping.

What a dense product costs is the share of a step that skipping can act on; how near a skipping one comes to its kept
fraction of that is the kernels' efficiency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import kernels
from ..kernels import TIME_MAJOR, Kept, PackedMatrix, Steps
from ..patterns import draw_kept
from . import precision
from .columns import DENSE, PHASES, STOCK
from .timing import Clock
from .workload import Product, Setup

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[[], object]


class _Operands:
    """Activations and weights of a product, whole and cut into time steps before anything is timed."""

    def __init__(self, product: Product, device: torch.device, dtype: torch.dtype) -> None:
        self.product = product
        rows, units, outputs = sum(product.rows), product.units, product.outputs
        self.x = torch.randn(rows, units, device=device, dtype=dtype)
        self.dy = torch.randn(rows, outputs, device=device, dtype=dtype)
        #: As the host holds it, ``[N, K]``.
        self.weight = torch.randn(outputs, units, device=device, dtype=dtype)
        self.packed = self.pack()
        self.x_steps = list(self.x.split(product.rows))
        self.dy_steps = list(self.dy.split(product.rows))

    def pack(self) -> PackedMatrix:
        """The weight laid out for this library's kernels; a training step does it once, for FP and BP of all steps."""
        return kernels.gemm_pack(self.weight.t())

    def torch_runs(self) -> dict[str, Run]:
        """The products as a dense implementation multiplies them."""
        xs, dys = (self.x_steps, self.dy_steps) if self.product.stepwise else ([self.x], [self.dy])
        weight = self.weight
        # Into memory that is there: ours is recycled, and fresh pages are no part of a product.
        ys, dxs = [torch.empty_like(dy) for dy in dys], [torch.empty_like(x) for x in xs]
        dweight = torch.empty_like(weight)
        return {
            "FP": lambda: [torch.mm(x, weight.t(), out=y) for x, y in zip(xs, ys, strict=True)],
            "BP": lambda: [torch.mm(dy, weight, out=dx) for dy, dx in zip(dys, dxs, strict=True)],
            "WG": lambda: torch.mm(self.dy.t(), self.x, out=dweight),
        }

    def our_runs(self, kept: Kept | None) -> dict[str, Run]:
        """The products by this library's kernels; dense without ``kept``."""
        x, dy, steps = self._laid_out()
        packed = self.packed
        if not self.product.stepwise:
            return {
                "FP": lambda: kernels.gemm_fp(x, packed, kept, steps),
                "BP": lambda: kernels.gemm_bp(dy, packed, kept, steps),
                "WG": lambda: kernels.gemm_wg(x, dy, kept, steps),
            }
        at = [None if kept is None else kept.at(t) for t in range(len(self.x_steps))]
        forward = list(zip([x_t.unsqueeze(0) for x_t in self.x_steps], at, strict=True))
        backward = list(zip([dy_t.unsqueeze(0) for dy_t in self.dy_steps], at, strict=True))
        return {
            "FP": lambda: [kernels.gemm_fp(x_t, packed, kept_t) for x_t, kept_t in forward],
            "BP": lambda: [kernels.gemm_bp(dy_t, packed, kept_t) for dy_t, kept_t in backward],
            "WG": lambda: kernels.gemm_wg(x, dy, kept, steps),
        }

    def _laid_out(self) -> tuple[Tensor, Tensor, Steps]:
        """``x`` and ``dy`` time-major, or packed where the steps differ in rows."""
        rows = self.product.rows
        if len(set(rows)) > 1:
            return self.x, self.dy, Steps.packed(rows)
        shape = (len(rows), rows[0], -1)
        return self.x.view(shape), self.dy.view(shape), TIME_MAJOR


@torch.no_grad()
def measure(product: Product, columns: Sequence[str], setup: Setup, clock: Clock) -> dict[str, Any]:
    """Time one matrix's products.

    Args:
        columns: those wanted; stock and ours-dense are always measured, as everything is told by them. A column in
            which nothing is skipped is ours-dense.

    Returns:
        For the JSON file: the product's description, ``ms`` by phase and column, and ``pack_ms``: what our columns
        need besides, once a training step, to lay the weight out.
    """
    operands = _Operands(product, setup.device, precision.dtype(setup.precision))
    runs = {STOCK: operands.torch_runs(), DENSE: operands.our_runs(None)}
    for column in columns:
        if product.skips(column):
            kept = draw_kept(len(product.rows), product.units, product.dropout[column], device=setup.device)
            runs[column] = operands.our_runs(kept)
    with precision.products(setup.precision, product.of_lstm):
        timed = {phase: clock.loop({column: runs[column][phase] for column in runs}) for phase in PHASES}
    packing = clock.loop({"pack": operands.pack})["pack"]
    return {**product.describe(), "ms": timed, "pack_ms": packing}
