"""docs/results.md, from the files of results alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from whole_file import write_whole

from . import figure
from .results import RESULT, Saved
from .rows import ALIASES, METRICS, MODES, ROWS, Row

PAGE, FIGURE = "results.md", "results-fig3.png"

_HEAD = """# The paper's tables, run here

Made by `python scripts/reproduce.py table` from the files in
[benchmarks/results/reproduce](../benchmarks/results/reproduce/README.md); no number is typed by hand. *Paper*: Sarma
et al. 2021, arXiv 2106.12089. *Ours* is the mean over seeds ± their standard deviation. A **shortened** run is not the
paper's experiment: it can be compared with other runs of its length only. `python scripts/reproduce.py run ROW` makes a
row.
"""
_SPEED = """
*Seconds* are the median over epochs or steps. Those in brackets are of runs at the lowest priority, beside other work:
they say nothing of speed, which the [benchmark](../README.md#benchmark) measures. *Skipped* is the share of
multiply-adds left out: of Zaremba, of all in LSTM and projection; of the others, of those with a dropped operand.
"""


def _ours(values: Sequence[float]) -> str:
    told = f"{mean(values):.2f}"
    return f"{told} ± {stdev(values):.2f}" if len(values) > 1 else told


def _cells(row: Row, runs: Sequence[Saved]) -> str:
    """A line of a model's table, for runs of the same length; without runs, one that says so."""
    paper = " / ".join(f"{row.paper[metric]:.2f}" if metric in row.paper else "-" for metric in row.metrics)
    speed = f"{row.speedup or 1.0:.2f}" if row.paper else "-"
    paper = paper if row.paper else "-"
    head = f"| {MODES[row.mode]} | {paper} | {speed}"
    if not runs:
        return f"{head} | no run yet | - | - | - | - | - | - |"
    ours = " / ".join(
        _ours([run.result.metrics[metric] for run in runs]) if metric in runs[0].result.metrics else "-"
        for metric in row.metrics
    )
    found = [seconds for run in runs if (seconds := run.seconds_per_unit()) is not None]
    seconds = _seconds(mean(found)) if found else "-"
    if not all(run.result.undisturbed for run in runs):
        seconds = f"({seconds})"
    skips = [run.result.skipped for run in runs if run.result.skipped is not None]
    lost = [run.result.hints_lost for run in runs if run.result.hints_lost is not None]
    told = [
        ours,
        str(len(runs)),
        f"**{runs[0].result.label}**" if not runs[0].result.full else runs[0].result.label,
        seconds,
        f"{100 * mean(skips):.1f}%" if skips else "-",
        str(sum(lost)) if lost else "-",
        ", ".join(dict.fromkeys(f"{run.result.precision}, {run.result.backend}" for run in runs)),
    ]
    return f"{head} | {' | '.join(told)} |"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def _lengths(row: Row, saved: Sequence[Saved]) -> list[list[Saved]]:
    """The runs of a row, those of the same length together; whole ones first, then the longer ones."""
    own = [run for run in saved if run.result.row == row.name]
    keys = sorted({(not run.result.full, -run.result.length) for run in own})
    return [[run for run in own if (not run.result.full, -run.result.length) == key] for key in keys]


def _model(rows: Sequence[Row], saved: Sequence[Saved]) -> str:
    """The table of a model, a line for each mode and length."""
    names = " / ".join(METRICS[metric] for metric in rows[0].metrics)
    unit = rows[0].unit[:-1]
    titles = ["mode", f"{names}: paper", "relative speed: paper", "ours", "seeds", "length", f"s per {unit}"]
    titles += ["skipped", "hints lost", "precision, backend"]
    lines = [f"## {rows[0].title}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        lines += [_cells(row, runs) for runs in _lengths(row, saved) or [[]]]
    own = [run for run in saved if run.result.row in {row.name for row in rows}]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(own))]).rstrip() + "\n"


def _notes(runs: Sequence[Saved]) -> list[str]:
    """What must be known of runs, each note once, with the runs that it is about unless these are all."""
    about: dict[str, list[Saved]] = {}
    for run in runs:
        for note in run.result.notes:
            about.setdefault(note, []).append(run)
    notes = []
    for note, those in about.items():
        named = (f"{MODES[run.result.row.rpartition('/')[2]]} seed {run.result.seed}" for run in those)
        notes.append(note if len(those) == len(runs) else f"{', '.join(named)}: {note}")
    return notes


def _run(run: Saved, page: Path) -> str:
    """A line of the table of all runs."""
    result = run.result
    link = os.path.relpath(run.folder / RESULT, page.parent)
    metrics = ", ".join(f"{METRICS[name]} {value:.2f}" for name, value in result.metrics.items() if name in METRICS)
    machine = result.machine
    where = [str(machine.get("gpu", machine.get("cpu", "?"))), f"{machine.get('threads', '?')} threads"]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version is not None)
    commit = result.commit[:10] + (" with changes" if result.dirty else "")
    cells = [f"[{result.row}]({link})", str(result.seed), result.label, metrics, ", ".join(where), versions, commit]
    return f"| {' | '.join([*cells, result.date[:10]])} |"


def _figure(saved: Sequence[Saved]) -> list[tuple[Row, list[Saved]]]:
    """The rows of Fig. 3 that have runs: all whole ones, or else the longest."""
    rows = [row for row in ROWS if row.group == ALIASES["fig3"]]
    return [(row, lengths[0]) for row in rows if (lengths := _lengths(row, saved))]


def text(saved: Sequence[Saved], page: Path) -> str:
    """The page.

    Args:
        saved: all results, of the table's rows.
        page: where it will be, for its links.
    """
    parts = [_HEAD, "## Fig. 3: validation perplexity by epoch\n"]
    if _figure(saved):
        parts.append(f"![Validation perplexity of Zaremba medium by epoch, three modes]({FIGURE})\n")
    else:
        parts.append(f"No run of {ALIASES['fig3']} yet.\n")
    for group in dict.fromkeys(row.group for row in ROWS):
        parts.append(_model([row for row in ROWS if row.group == group], saved))
    parts.append(_SPEED.lstrip("\n"))
    if saved:
        titles = "| row | seed | length | metrics | machine | versions | commit | date |"
        lines = [titles, "|---" * 8 + "|", *(_run(run, page) for run in saved)]
        parts.append("## Every run\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def write(saved: Sequence[Saved], folder: Path) -> list[Path]:
    """Write page and figure into ``folder``; their paths."""
    page, curves = folder / PAGE, _figure(saved)
    made = [page]
    if curves:
        figure.draw(curves, folder / FIGURE)
        made.append(folder / FIGURE)
    write_whole(page, text(saved, page))
    return made
