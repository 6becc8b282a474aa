#!/usr/bin/env python
"""Times products that are small enough for skipping to cost more than it gains, which is what sd_plugin/_pays.py knows.

    OMP_NUM_THREADS=1 python benchmarks/small_products.py [--repeats 20] [--p 0.3 --p 0.5]

A training step, forward and backward, of a dropout and a linear layer, and of two stacked cells over 25 time steps:
PyTorch's own, ours skipping whatever the size, and ours as installed. Medians of CPU time, in turns; ratios are to
PyTorch's own. Where "skipping" falls below 1 is where SD_PLUGIN_SKIP_FROM belongs on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from sd_plugin import StackedStructuredLSTM, StructuredDropout, StructuredLinear, _pays
from sd_plugin.bench import machine

#: Rows, inputs and outputs of linear layers; units and batch of cells.
LINEAR = [(32, 256, 256), (250, 256, 256), (800, 256, 256), (700, 512, 512), (700, 650, 2600), (700, 650, 10_000)]
CELLS = [(64, 32), (128, 64), (256, 32), (256, 64), (512, 32)]
STEPS = 25
Run = Callable[[], Any]
Maker = Callable[[float], tuple[int, Run, Run]]


def linear(rows: int, inputs: int, outputs: int, p: float) -> tuple[int, Run, Run]:
    """Multiply-adds of the product, a step of PyTorch's own modules and one of ours."""
    batch = min(rows, 20)
    source = torch.randn(rows // batch, batch, inputs, requires_grad=True)
    stock = nn.Sequential(nn.Dropout(p), nn.Linear(inputs, outputs))
    ours = nn.Sequential(StructuredDropout(p), StructuredLinear(inputs, outputs))
    size = source.shape[:2].numel() * inputs * outputs
    return size, lambda: stock(source).square().sum().backward(), lambda: ours(source).square().sum().backward()


def cells(hidden: int, batch: int, p: float) -> tuple[int, Run, Run]:
    """As :func:`linear`; multiply-adds of one time step. Ours drop the recurrent state, too."""
    ours = StackedStructuredLSTM(2, 2 * hidden, hidden, dropout=p, recurrent_dropout=p, output_dropout=p)
    layers = nn.ModuleList([nn.LSTMCell(2 * hidden, hidden), nn.LSTMCell(hidden, hidden)])
    source, zeros = torch.randn(STEPS, batch, 2 * hidden), torch.zeros(2, batch, hidden)

    def run_stock() -> None:
        states, outputs = [(zeros[0], zeros[0]), (zeros[1], zeros[1])], []
        for x in source:
            for index, layer in enumerate(layers):
                states[index] = layer(x, states[index])
                x = nn.functional.dropout(states[index][0], p)
            outputs.append(x)
        torch.stack(outputs).square().sum().backward()

    def run_ours() -> None:
        run, state, outputs = ours.start(STEPS, batch, source), (zeros, zeros), []
        for t, x in enumerate(source):
            y, state = run.step(t, x, state)
            outputs.append(y)
        torch.stack(outputs).square().sum().backward()

    weights = sum(weight.numel() for layer in ours.layers for weight in (layer.weight_ih, layer.weight_hh))
    return batch * weights, run_stock, run_ours


def measured(stock: Run, ours: Run, repeats: int) -> str:
    """Three cells of a row: milliseconds of PyTorch's own, and the ratios of ours."""
    as_installed = _pays.ASKED_FOR
    seconds: list[list[float]] = [[], [], []]
    for turn in range(repeats + 2):
        for times, run, asked_for in zip(seconds, (stock, ours, ours), (None, 0, as_installed), strict=True):
            _pays.ASKED_FOR = asked_for
            start = time.process_time()
            run()
            if turn > 1:
                times.append(time.process_time() - start)
    _pays.ASKED_FOR = as_installed
    ratios = [statistics.median(b / a for a, b in zip(seconds[0], times, strict=True)) for times in seconds[1:]]
    return f"{1000 * statistics.median(seconds[0]):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f}"


def products(rates: list[float], only_small: bool) -> Iterator[tuple[str, Maker, float]]:
    """Name, maker and dropout of every row."""
    most = 1 if only_small else None
    made: list[tuple[str, Maker]] = []
    made += [(f"linear, {r} x {i} -> {o}", partial(linear, r, i, o)) for r, i, o in LINEAR[:most]]
    made += [(f"cells, {h} units, batch {b}", partial(cells, h, b)) for h, b in CELLS[:most]]
    return ((name, make, p) for name, make in made for p in rates)


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed turns (default 20)")
    parser.add_argument("--p", type=float, action="append", help="dropout; may be repeated (default 0.3 and 0.5)")
    parser.add_argument("--small", action="store_true", help="the smallest of each kind only")
    options = parser.parse_args()
    if options.repeats < 1 or not all(0 < p < 1 for p in options.p or []):
        parser.error("--repeats must be at least 1, and --p between 0 and 1")
    here = machine.machine(torch.device("cpu"))
    print(f"{here['cpu']}, {here['isa']}, {torch.get_num_threads()} thread(s); torch {torch.__version__}\n")
    print("| product | p | million multiply-adds | PyTorch's own, ms | skipping | as installed |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, make, p in products(options.p or [0.3, 0.5], options.small):
        multiply_adds, stock, ours = make(p)
        told = f"{name} | {p} | {multiply_adds / 1e6:.1f}"
        print(f"| {told} | {measured(stock, ours, options.repeats)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
