#!/usr/bin/env python
"""Draws the figures of a benchmark from its JSON file: speed-ups by phase and whole step, and the sweeps.

    python benchmarks/plot.py FILE.json ... [--out DIR] [--format png|svg]

For each FILE: ``FILE-speedups`` with the paper's bars (FP, BP, WG and the whole step, stock = 1), and where it holds
sweeps ``FILE-sweep-p`` and so on.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

try:
    import matplotlib as mpl
    import typer
except ImportError:
    print("plot.py needs matplotlib and typer: pip install '.[plot]'", file=sys.stderr)
    raise SystemExit(2) from None

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sd_plugin.bench import results, summary
from sd_plugin.bench.columns import DENSE, LABELS, NR_RH_ST, NR_ST, PHASES, STOCK
from sd_plugin.errors import UsageError

# One line for what is wrong with a command line, as the programs in scripts/ have it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from typer_program import run_app

FORMATS = ("png", "svg")
#: Of Okabe and Ito's palette, told apart by every kind of colour vision, and in grey.
COLOURS = {STOCK: "#000000", DENSE: "#56B4E9", NR_ST: "#E69F00", NR_RH_ST: "#009E73"}
MARKERS = {STOCK: "o", DENSE: "s", NR_ST: "^", NR_RH_ST: "D"}
BARS = (DENSE, NR_ST, NR_RH_ST)
#: Axis of a sweep -> its label.
AXES = {
    "p": "dropout probability p",
    "H": "hidden units H",
    "B": "batch size B (rows)",
    "T": "time steps T",
}
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
    "svg.fonttype": "none",
    # The same file for the same data.
    "svg.hashsalt": "sd-plugin",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _caption(figure: Figure, document: results.Document) -> None:
    """Where and how it was measured, below; and across the figure if it is no result."""
    # About 18 characters of this size are as wide as an inch.
    width = int(18 * figure.get_figwidth())
    lines = [line for text in summary.head(document) for line in textwrap.wrap(text, width)]
    figure.text(0.01, 0.005, "\n".join(lines), fontsize=7, color="#444444", va="bottom")
    if document["scale"] != "full":
        figure.text(
            0.5, 0.5, f"{document['scale']} shapes: no result", fontsize=30, color="#CC0000", alpha=0.3, rotation=20,
            ha="center", va="center",
        )  # fmt: skip


def _ratios(workload: summary.Record, column: str) -> dict[str, float]:
    """Speed-up over stock by group of bars, for those that were measured."""
    found: dict[str, float | None] = {
        phase: summary.phase_ratio(workload["products"], column, [phase]) for phase in PHASES
    }
    found["step"] = summary.ratio(workload, column)
    return {group: ratio for group, ratio in found.items() if ratio is not None}


def _bars(axes: Axes, workload: summary.Record) -> None:
    """One workload: groups FP, BP, WG and whole step, a bar for each column, stock as the line at 1."""
    groups, width = [*PHASES, "step"], 0.26
    for i, column in enumerate(BARS):
        if column not in workload["columns"]:
            continue
        ratios = _ratios(workload, column)
        at = [groups.index(group) + (i - 1) * width for group in ratios]
        bars = axes.bar(at, list(ratios.values()), 0.92 * width, color=COLOURS[column], label=LABELS[column])
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        bound = summary.bound(workload, column)
        if column != DENSE and bound is not None:
            middle = len(groups) - 1 + (i - 1) * width
            axes.plot([middle - width / 2, middle + width / 2], [bound, bound], color="black", linewidth=1.5)
    axes.axhline(1.0, color=COLOURS[STOCK], linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(groups)), [*PHASES, "whole step"])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("speed-up over stock")
    axes.set_title(workload["title"])


def speedups(document: results.Document) -> Figure:
    """The paper's figure: a panel for each workload."""
    workloads = list(document["workloads"].values())
    columns = min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(max(9.5, 4.6 * columns), 3.4 * rows + 1.0), squeeze=False)
    for axes, workload in zip(panels.flat, workloads, strict=False):
        _bars(axes, workload)
    for axes in panels.flat[len(workloads) :]:
        axes.set_visible(False)
    handles = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    handles["stock = 1"] = plt.Line2D([], [], color=COLOURS[STOCK], linewidth=0.8, linestyle="--")
    handles["bound of skipping alone"] = plt.Line2D([], [], color="black", linewidth=1.5)
    figure.legend(list(handles.values()), list(handles), loc="upper center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1 - 0.35 / figure.get_figheight()))
    _caption(figure, document)
    return figure


def _line(axes: Axes, column: str, x: list[float], samples: list[list[float]]) -> None:
    """Medians with their interquartile ranges."""
    spreads = [summary.Spread.of(values) for values in samples]
    medians, errors = [s.median for s in spreads], [s.iqr / 2 for s in spreads]
    axes.errorbar(
        x, medians, errors, color=COLOURS[column], marker=MARKERS[column], markersize=5, capsize=2, label=LABELS[column]
    )


def _layers(axes: Axes, points: list[Any]) -> None:
    """The layer, forward and backward."""
    for column in points[0]["layer_ms"]:
        _line(axes, column, [p["value"] for p in points], [p["layer_ms"][column] for p in points])
    axes.set_title("one LSTM layer, forward + backward")


def _products(axes: Axes, points: list[Any]) -> None:
    """Its products, with the time that perfect skipping of our dense ones would take."""
    x = [point["value"] for point in points]
    for column in points[0]["layer_ms"]:
        _line(axes, column, x, [[summary.phase_ms(point["products"], column)] for point in points])
    ideal = [
        summary.phase_ms(point["products"], DENSE) - summary.skippable_ms(point["products"], NR_RH_ST)
        for point in points
    ]  # fmt: skip
    axes.plot(x, ideal, color="black", linestyle=":", label="(1 − p) of ours, dense")  # noqa: RUF001 - a minus sign
    axes.set_title("its products FP + BP + WG")


def _logarithmic(axes: Axes, values: list[float]) -> None:
    """Both axes logarithmic: the measured ``values`` across, plain numbers up."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def sweep(document: results.Document, axis: str) -> Figure:
    """Time of one LSTM layer, and of its products, against ``axis``."""
    points = sorted((p for p in document["sweeps"] if p["axis"] == axis), key=lambda point: point["value"])
    fixed = ", ".join(f"{name} = {points[0][name]:g}" for name in AXES if name != axis)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    _layers(left, points)
    _products(right, points)
    for axes in (left, right):
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel("time (ms)")
        if axis == "p":
            axes.set_ylim(bottom=0)
        else:
            _logarithmic(axes, [point["value"] for point in points])
        axes.set_title(f"{axes.get_title()}\n{fixed}")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 0.93))
    _caption(figure, document)
    return figure


def draw(file: Path, out: Path, kind: str) -> list[Path]:
    """Draw everything that ``file`` holds; the paths written.

    Raises:
        UsageError: ``file`` is no result of a benchmark, or holds nothing yet; the folder is then not made.
    """
    document = results.load(file)
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        if document["workloads"]:
            figures["speedups"] = speedups(document)
        for axis in AXES:
            if any(point["axis"] == axis for point in document["sweeps"]):
                figures[f"sweep-{axis}"] = sweep(document, axis)
        if not figures:
            raise UsageError(f"{file} holds nothing to draw: the run ended before its first workload")
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for name, figure in figures.items():
            path = out / f"{file.stem}-{name}.{kind}"
            figure.savefig(path, metadata={"Date": None} if kind == "svg" else None)
            plt.close(figure)
            written.append(path)
    return written


@app.command()
def main(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.json...", help="Files of sd-plugin bench --json.")],
    out: Annotated[Path, typer.Option(help="Folder of the figures; made if it is missing.")] = Path(),
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "png",
) -> None:
    """Draw the figures of one or more benchmark files."""
    try:
        if format not in FORMATS:
            raise UsageError(f"--format {format!r} is not valid; valid: {', '.join(FORMATS)}")
        for file in files:
            for path in draw(file, out, format):
                print(path)
    except (UsageError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    run_app(app, "plot.py")
