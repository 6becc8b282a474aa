"""Medians, ratios, bounds and tables from the JSON file of a benchmark. Standard library only.

Everything that is told about a run is computed here from its raw samples; nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from .columns import (
    COLUMNS,
    DEFAULT_PRECISIONS,
    DENSE,
    FP32,
    LABELS,
    NR_RH_ST,
    PHASES,
    PRECISION_LABELS,
    SKIPPING,
    STOCK,
)

#: A workload, a product, or a whole document, as :mod:`.results` reads it.
Record = dict[str, Any]

NONE = "-"


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of samples, in their unit."""

    median: float
    iqr: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample; of one the range is 0."""
        if len(samples) == 1:
            return cls(samples[0], 0.0)
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), high - low)


def precisions(document: Record) -> list[str]:
    """Those measured; the first is that of what a workload holds itself."""
    settings = document["settings"]
    # A file without them has what torch does by default.
    found: list[str] = settings.get("precisions") or [DEFAULT_PRECISIONS[settings.get("device", "cpu")][0]]
    return found


def runs(document: Record) -> list[tuple[str, Record]]:
    """Every workload in every precision: its title there, and what was measured."""
    found = []
    told = precisions(document) != [FP32]
    for workload in document["workloads"].values():
        for precision, measured in in_precisions(document, workload).items():
            title = f"{workload['title']}, {PRECISION_LABELS[precision]}" if told else workload["title"]
            found.append((title, measured))
    return found


def in_precisions(document: Record, workload: Record) -> dict[str, Record]:
    """The workload as it was measured in each precision."""
    first = precisions(document)[0]
    others: dict[str, Record] = workload.get("precisions", {})
    return {first: workload, **{name: {**workload, **measured} for name, measured in others.items()}}


def step(workload: Record, column: str) -> Spread | None:
    """Milliseconds of a training step; None where the workload has no such column."""
    measured = workload["columns"].get(column)
    return Spread.of(measured["step_ms"]) if measured else None


def ratio(workload: Record, column: str, over: str = STOCK) -> float | None:
    """How many times faster than ``over`` a training step is in ``column``."""
    mine, other = step(workload, column), step(workload, over)
    return other.median / mine.median if mine and other else None


def product_ms(product: Record, phase: str, column: str) -> float:
    """Milliseconds of one phase of all such products; a column in which they skip nothing is ours-dense."""
    samples = product["ms"][phase]
    return float(median(samples.get(column) or samples[DENSE])) * int(product["count"])


def phase_ms(products: Sequence[Record], column: str, phases: Iterable[str] = PHASES) -> float:
    """Milliseconds of ``phases`` of all products together."""
    return sum(product_ms(product, phase, column) for product in products for phase in phases)


def pack_ms(products: Sequence[Record]) -> float:
    """Milliseconds that our columns need, once a step, to lay all weights out for their products."""
    return sum(float(median(product["pack_ms"])) * int(product["count"]) for product in products)


def phase_ratio(products: Sequence[Record], column: str, phases: Sequence[str] = PHASES) -> float | None:
    """How many times faster than torch's the products of ``phases`` are in ``column``; None without products.

    Of all phases together: packing included, which none of them can be charged with alone.
    """
    if not products:
        return None
    packing = pack_ms(products) if column != STOCK and set(phases) == set(PHASES) else 0.0
    return phase_ms(products, STOCK, phases) / (phase_ms(products, column, phases) + packing)


def kept_fraction(product: Record, column: str) -> float:
    """Share of a product's multiply-adds that ``column`` does."""
    return float(product["kept"].get(column, product["units"])) / float(product["units"])


def efficiency(products: Sequence[Record], column: str, phases: Sequence[str] = PHASES) -> float | None:
    """How near skipping comes to perfect: (ours dense × kept fraction) / ours skipping, of the products that skip."""
    skipping = [product for product in products if column in product["kept"]]
    if not skipping:
        return None
    pairs = [(product, phase) for product in skipping for phase in phases]
    ideal = sum(product_ms(product, phase, DENSE) * kept_fraction(product, column) for product, phase in pairs)
    return ideal / phase_ms(skipping, column, phases)


def skippable_ms(products: Sequence[Record], column: str) -> float:
    """Milliseconds that perfect skipping would take off our own dense products."""
    return sum(phase_ms([product], DENSE) * (1.0 - kept_fraction(product, column)) for product in products)


def bound(workload: Record, column: str, over: str = STOCK) -> float | None:
    """Amdahl's bound of :func:`ratio`: what our dense step would be if skipping cost nothing and were perfect.

    None where products were not timed, or where their sum exceeds the step (a noisy run).
    """
    dense, other, products = step(workload, DENSE), step(workload, over), workload.get("products")
    if dense is None or other is None or not products:
        return None
    rest = dense.median - skippable_ms(products, column)
    return other.median / rest if rest > 0.0 else None


@dataclass(frozen=True)
class Table:
    """A table for any medium: a title, a heading and rows of text; the first two columns name the row."""

    title: str
    heading: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown, numbers to the right."""
        align = ["---", "---", *["---:"] * (len(self.heading) - 2)]
        lines = [self.heading, align, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(value: float) -> str:
    return f"{value:.{0 if value >= 1000 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _spread(value: Spread | None) -> str:
    return NONE if value is None else f"{_ms(value.median)} ({_ms(value.iqr)})"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"  # noqa: RUF001 - as the documents write it


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f}%"


def _label(document: Record, column: str) -> str:
    """A tiny run says so in every row."""
    return LABELS[column] if document["scale"] == "full" else f"{LABELS[column]} ({document['scale']})"


def _memory(measured: Record | None) -> str:
    memory = (measured or {}).get("memory")
    if not memory:
        return NONE
    return f"failed: {memory['error']}" if "error" in memory else f"{memory['peak']:.0f} (+{memory['increase']:.0f})"


def _columns(document: Record) -> list[str]:
    return [column for column in COLUMNS if column in document["settings"]["columns"]]


def step_table(document: Record) -> Table:
    """Whole training steps: every workload by every column."""
    heading = [
        "workload",
        "column",
        "ms per step (IQR)",
        "to stock",
        "bound",
        "to ours, dense",
        "bound",
        "peak MiB (increase)",
    ]
    rows = []
    for title, workload in runs(document):
        for column in _columns(document):
            skips = column in SKIPPING and column in workload["columns"]
            bounds = [bound(workload, column, over) if skips else None for over in (STOCK, DENSE)]
            rows.append(
                [
                    title,
                    _label(document, column),
                    _spread(step(workload, column)),
                    _times(ratio(workload, column)),
                    _times(bounds[0]),
                    _times(ratio(workload, column, DENSE)),
                    _times(bounds[1]),
                    _memory(workload["columns"].get(column)),
                ]
            )
    return Table("whole training steps", heading, rows)


def _phase_cells(products: Sequence[Record], column: str) -> list[str]:
    cells = []
    for phase in PHASES:
        cells += [_ms(phase_ms(products, column, [phase])), _times(phase_ratio(products, column, [phase]))]
        cells.append(_share(efficiency(products, column, [phase])))
    packing = NONE if column == STOCK else _ms(pack_ms(products))
    return [*cells, packing, _times(phase_ratio(products, column)), _share(efficiency(products, column))]


def phase_table(document: Record) -> Table:
    """The products by themselves: milliseconds, ratio to torch, efficiency of skipping, and packing."""
    heading = ["workload", "column"]
    for phase in PHASES:
        heading += [f"{phase} ms", "to torch", "of perfect"]
    heading += ["packing ms", "all: to torch", "of perfect"]
    rows = []
    for title, workload in runs(document):
        products: list[Record] = workload.get("products") or []
        for column in _columns(document) if products else []:
            cells = _phase_cells(products, column) if column in workload["columns"] else [NONE] * 12
            rows.append([title, _label(document, column), *cells])
    return Table("products of LSTM layers and projection, by themselves", heading, rows)


def sweep_table(document: Record) -> Table:
    """One LSTM layer, forward and backward, and its products."""
    heading = ["layer", "column", "ms (IQR)", "to stock", "products ms", "to torch", "of perfect"]
    rows = []
    for point in document.get("sweeps", []):
        shape = ", ".join(f"{axis}={point[axis]:g}" for axis in ("p", "H", "B", "T"))
        for column, samples in point["layer_ms"].items():
            spread, products = Spread.of(samples), point["products"]
            stock = point["layer_ms"].get(STOCK)
            rows.append(
                [
                    f"{point['axis']}: {shape}",
                    _label(document, column),
                    _spread(spread),
                    _times(Spread.of(stock).median / spread.median if stock else None),
                    _ms(phase_ms(products, column)),
                    _times(phase_ratio(products, column)),
                    _share(efficiency(products, column)),
                ]
            )
    return Table("one LSTM layer, forward and backward", heading, rows)


def tables(document: Record) -> list[Table]:
    """All tables that have rows."""
    made = (step_table(document), phase_table(document), sweep_table(document))
    return [table for table in made if table.rows]


def _backend(backend: Record) -> str:
    told = [backend["build"][key] for key in ("isa", "compiler") if backend["build"].get(key)]
    return f"backend {backend['name']}" + (f" ({', '.join(told)})" if told else "")


PRECISION = (
    "fp32+TF32 is torch's default on CUDA: cuDNN's LSTM multiplies in TF32, everything else in float32. fp32 is "
    "strict. fp16 and bf16 are autocast around forward and loss, without loss scaling. Columns are compared to stock "
    "of the same precision."
)
BOUND = (
    "The bound is about what perfect, free skipping would give: our dense products, timed on their own, less the share "
    "that is dropped."
)


def head(document: Record) -> list[str]:
    """What every table must be read with: scale, machine, versions, settings."""
    machine, versions, settings = document["machine"], document["versions"], document["settings"]
    git = document["git"]
    commit = f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"
    threads = f"{settings['threads']} thread{'s' * (settings['threads'] != 1)}"
    runs = f"Medians of {settings['repeats']} interleaved runs (interquartile range), seed {settings['seed']}"
    lines = [
        f"{device}; {threads}; {_backend(document['backend'])}; {installed}{commit}.",
        f"{runs}, {document['date']}. {BOUND}",
    ]
    if precisions(document) != [FP32]:
        lines.append(PRECISION)
    if document["scale"] != "full":
        lines.insert(0, f"{document['scale'].upper()} SHAPES, which test the program: these are no results.")
    if not document["complete"]:
        lines.insert(0, "The run was not finished: what is here was measured, the rest is missing.")
    return lines


def fastest_stock(document: Record) -> list[str]:
    """For each workload measured in several precisions: which stock is the fastest, and NR+RH+ST compared to that."""
    told = []
    for workload in document["workloads"].values():
        measured = in_precisions(document, workload)
        stocks = {name: found.median for name, run in measured.items() if (found := step(run, STOCK))}
        if len(stocks) < 2:
            continue
        best = min(stocks, key=lambda name: stocks[name])
        ratios = [
            f"{PRECISION_LABELS[name]} {_times(stocks[best] / found.median)}"
            for name, run in measured.items()
            if (found := step(run, NR_RH_ST))
        ]
        ours = f"; {LABELS[NR_RH_ST]} to that one: {', '.join(ratios)}" if ratios else ""
        told.append(
            f"{workload['title']}: the fastest stock is {PRECISION_LABELS[best]}, {_ms(stocks[best])} ms{ours}."
        )
    return told


def notes(document: Record) -> list[str]:
    """What a reader must know of each workload, and what went another way than asked."""
    told = [f"{workload['title']}: {workload['note']}" for workload in document["workloads"].values()]
    told += fastest_stock(document)
    for title, workload in runs(document):
        for column, measured in workload["columns"].items():
            if None in measured["loss"]:
                told.append(f"{title}, {LABELS[column]}: the loss was not finite; do not trust its time.")
        for site, lost in workload["lost_hints"].items():
            told.append(f"{title}: {lost} patterns of {site} reached no product that could skip.")
        for call in workload["fallbacks"]:
            told.append(
                f"{title}: {call['calls']} calls of {call['operation']} passed over backend "
                f"{call['backend']}: {call['reason']}."
            )
    return told
