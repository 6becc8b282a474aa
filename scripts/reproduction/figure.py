"""The paper's Fig. 3: validation perplexity by epoch, the modes of one model in one plot."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

# The figures of the project look alike.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plot import COLOURS, MARKERS, STYLE, mpl, plt
from whole_file import write_whole

from sd_plugin.bench.columns import NR_RH_ST, NR_ST, STOCK

from .results import Saved
from .rows import MODES, Row

_LOOKS = {"random": STOCK, "nr_st": NR_ST, "nr_rh_st": NR_RH_ST}
#: Metric that the figure shows.
_METRIC = "valid_perplexity"


def _values(saved: Saved) -> dict[int, float]:
    """Perplexity by epoch."""
    return {int(point["epoch"] or 0): point[_METRIC] or 0.0 for point in saved.curve}


def _label(row: Row, runs: Sequence[Saved]) -> str:
    """An entry of the legend: mode, seeds, length if it is shortened, and where it ends."""
    ends = [_values(run)[max(_values(run))] for run in runs]
    seeds = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
    result = runs[0].result
    shortened = "" if result.full else f", {result.label}"
    return f"{MODES[row.mode]}{seeds}{shortened}: {sum(ends) / len(ends):.1f}"


def draw(curves: Sequence[tuple[Row, Sequence[Saved]]], path: Path) -> None:
    """Write the figure as PNG.

    Args:
        curves: a row with runs of it that have the same length, at least one.
        path: where to; replaced as a whole.
    """
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.8))
        ends: list[float] = []
        for row, runs in curves:
            colour, marker = COLOURS[_LOOKS[row.mode]], MARKERS[_LOOKS[row.mode]]
            by_run = [_values(run) for run in runs]
            epochs = sorted(set.intersection(*(set(values) for values in by_run)))
            low, high = ([pick(values[at] for values in by_run) for at in epochs] for pick in (min, max))
            mean = [sum(values[at] for values in by_run) / len(by_run) for at in epochs]
            style = {"color": colour, "marker": marker, "markersize": 4, "markevery": max(1, len(epochs) // 12)}
            axes.plot(epochs, mean, label=_label(row, runs), linewidth=1.5, **style)
            if len(runs) > 1:
                axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
            paper = row.paper[_METRIC]
            axes.axhline(paper, color=colour, linewidth=0.8, linestyle=":")
            ends += [min(mean), paper]
        # The first epochs are hundreds; what is compared is where the curves end.
        axes.set_ylim(0.97 * min(ends), 1.6 * max(ends))
        axes.set_xlim(0.5, curves[0][0].length + 0.5)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation perplexity")
        axes.set_title(f"{curves[0][0].title}, Penn Treebank")
        axes.plot([], [], color="#444444", linewidth=0.8, linestyle=":", label="the paper's last epoch")
        axes.legend(frameon=False, fontsize=9)
        figure.tight_layout()
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
        plt.close(figure)
    write_whole(path, content.getbuffer())
