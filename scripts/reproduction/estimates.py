"""How long a row will take here: from its own results, or else from a file of ``sd-plugin bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sd_plugin.bench import results as bench
from sd_plugin.bench.columns import DENSE, STOCK

from .results import Saved
from .rows import Row


@dataclass(frozen=True)
class Estimate:
    """Seconds of an epoch or step, and where they come from."""

    seconds_per_unit: float
    source: str


class Estimates:
    """What is known of the time of rows.

    Args:
        saved: results that are there.
        benchmark: a file of ``sd-plugin bench``; it need not be there.
    """

    def __init__(self, saved: Sequence[Saved], benchmark: Path) -> None:
        self._saved = saved
        self._benchmark = bench.load(benchmark) if benchmark.exists() else None
        self._name = benchmark.name

    def of(self, row: Row, stock: bool = False) -> Estimate | None:
        """The estimate for a row, None if nothing is known."""
        for saved in self._saved:
            if saved.result.row == row.name and (seconds := saved.seconds_per_unit()) is not None:
                return Estimate(seconds, f"seed {saved.result.seed}")
        return self._benchmarked(row, stock)

    def _benchmarked(self, row: Row, stock: bool) -> Estimate | None:
        if self._benchmark is None or row.workload is None:
            return None
        baseline = DENSE if row.system == "zaremba" and not stock else STOCK
        columns = self._benchmark["workloads"].get(row.workload, {}).get("columns", {})
        samples = columns.get(baseline if row.mode == "random" else row.mode, {}).get("step_ms")
        if not samples:
            return None
        return Estimate(median(samples) / 1000 * row.steps, self._name)


def in_words(seconds: float) -> str:
    """A duration to two digits or so: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if unit == "min" else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
