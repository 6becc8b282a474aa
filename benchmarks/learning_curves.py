#!/usr/bin/env python
"""Draws the perplexity per epoch of language models, as in the paper's Fig. 3, from the logs of their trainings.

    python benchmarks/learning_curves.py LOG.csv ... --out FIGURE.png

The logs are those of scripts/zaremba_main.py (``log.csv`` in its run folder). There is a panel for each model; in it
validation is solid, training dashed. A run that ended before its schedule did is labelled so.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

try:
    import matplotlib as mpl
    import typer
except ImportError:
    print("learning_curves.py needs matplotlib and typer: pip install '.[plot]'", file=sys.stderr)
    raise SystemExit(2) from None

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from plot import COLOURS, FORMATS, MARKERS, STYLE

from sd_plugin.bench.columns import LABELS, NR_RH_ST, NR_ST, STOCK
from sd_plugin.errors import UsageError

# Files and command lines as the programs in scripts/ have them.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from typer_program import run_app
from whole_file import write_whole

#: Mode of a log -> its colour and marker, and its name in the figure.
LOOKS = {"random": STOCK, "nr_st": NR_ST, "nr_rh_st": NR_RH_ST}
NAMES = {"random": "NR+Random", "nr_st": LABELS[NR_ST], "nr_rh_st": LABELS[NR_RH_ST]}


@dataclass(frozen=True)
class Run:
    """One log.

    Attributes:
        model, mode, seed: what was trained.
        schedule: epochs that its schedule has.
        epochs: those that the log has, from 1; train, valid: their perplexities.
    """

    model: str
    mode: str
    seed: str
    schedule: int
    epochs: list[int]
    train: list[float]
    valid: list[float]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Parse a log; UsageError if it is none."""
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            if not rows:
                raise ValueError("it has no rows")
            first = rows[0]
            run = cls(
                first["name"],
                first["mode"],
                first["seed"],
                int(rows[-1]["epochs"]),
                [int(row["epoch"]) for row in rows],
                [float(row["train_perplexity"]) for row in rows],
                [float(row["valid_perplexity"]) for row in rows],
            )
        except KeyError as error:
            raise UsageError(f"{path} is no log of zaremba_main.py (it has no column {error})") from None
        except (TypeError, ValueError, csv.Error) as error:
            raise UsageError(f"{path} is no log of zaremba_main.py ({error})") from None
        if run.mode not in LOOKS:
            raise UsageError(f"{path}: unknown mode {run.mode!r}; known: {', '.join(LOOKS)}")
        return run

    def label(self, with_seed: bool) -> str:
        """Its entry in the legend."""
        shortened = f", {self.epochs[-1]} of {self.schedule} epochs" if self.epochs[-1] < self.schedule else ""
        seed = f", seed {self.seed}" if with_seed else ""
        return f"{NAMES[self.mode]}{seed}{shortened}: {self.valid[-1]:.2f}"


def _panel(axes: Axes, runs: list[Run]) -> None:
    """The runs of one model."""
    modes = [run.mode for run in runs]
    for run in runs:
        look = LOOKS[run.mode]
        style = {"color": COLOURS[look], "marker": MARKERS[look], "markersize": 4, "linewidth": 1.5}
        # About a dozen marks on each curve tell them apart; one for each of 55 epochs would hide them.
        style["markevery"] = max(1, len(run.epochs) // 12)
        axes.plot(run.epochs, run.valid, label=run.label(modes.count(run.mode) > 1), **style)
        axes.plot(run.epochs, run.train, **{**style, "linestyle": "--", "linewidth": 1.0, "markersize": 2})
    axes.set_yscale("log")
    # Curves that end at 80 begin at hundreds: linear axes would show nothing of where they end.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity")
    axes.set_title(runs[0].model.replace("_", " ").capitalize())
    axes.legend(frameon=False, fontsize=9, title="valid, after the last epoch", title_fontsize=9)


def _check_target(out: Path) -> None:
    """Raise UsageError unless ``out`` can be a figure, in a folder that is there."""
    if out.suffix[1:] not in FORMATS:
        raise UsageError(f"--out {out}: the ending must be one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")


def _save(figure: Figure, out: Path) -> None:
    """Write a figure; what was there is replaced by all of it or not at all."""
    kind, drawn = out.suffix[1:], io.BytesIO()
    figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_whole(out, drawn.getvalue())


def draw(runs: list[Run]) -> Figure:
    """A panel for each model, in the order in which they come."""
    models = list(dict.fromkeys(run.model for run in runs))
    figure, panels = plt.subplots(1, len(models), figsize=(max(6.5, 5.0 * len(models)), 4.6), squeeze=False)
    for axes, model in zip(panels.flat, models, strict=True):
        _panel(axes, [run for run in runs if run.model == model])
    kinds = [
        plt.Line2D([], [], color="black", linewidth=1.5, label="valid"),
        plt.Line2D([], [], color="black", linewidth=1.0, linestyle="--", label="train (with dropout)"),
    ]
    figure.legend(handles=kinds, loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG.csv...", help="Logs of scripts/zaremba_main.py.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help=f"The figure; its ending is {' or '.join(FORMATS)}.")],
) -> None:
    """Draw the perplexity per epoch of one or more runs."""
    try:
        _check_target(out)
        runs = [Run.read(path) for path in logs]
        with mpl.rc_context(STYLE):
            _save(draw(runs), out)
        print(out)
    except (UsageError, OSError) as error:
        print(f"learning_curves.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    run_app(app, "learning_curves.py")
