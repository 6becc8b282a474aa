"""What ``reproduce.py`` shows: rows, the queue, and what a run writes."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.table import Table

from .estimates import Estimates, in_words
from .job import Job
from .queueing import Entry, Queue, State
from .results import Saved, seconds_per_unit
from .rows import Row
from .supervision import Program, Watch
from .systems import SYSTEMS

_PROGRAMS = {
    "zaremba": "scripts/zaremba_main.py",
    "awd_lstm": "scripts/awd_main.py",
    "opennmt": "onmt_train",
    "targer": "scripts/ner_main.py",
}


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title == "row")
    return table


def table_of_rows(rows: Iterable[Row], saved: Iterable[Saved], estimates: Estimates) -> Table:
    """A line for each row: what it runs, the paper's figures, how long it takes here, and what there is."""
    table = _table("row", "runs", "length", "paper", "time here", "results")
    own = list(saved)
    for row in rows:
        runs = f"{_PROGRAMS[row.system]} {row.config or row.data}"
        kind = row.metrics[-1].removeprefix("test_").replace("f1", "F1").replace("bleu", "BLEU")
        paper = " / ".join(f"{value:.2f}" for value in row.paper.values()) + f" {kind}" if row.paper else "-"
        estimate = estimates.of(row)
        time = f"{in_words(row.length * estimate.seconds_per_unit)} ({estimate.source})" if estimate else "?"
        there = [f"seed {run.result.seed}, {run.result.label}" for run in own if run.result.row == row.name]
        table.add_row(row.name, runs, f"{row.length:,} {row.unit}", paper, time, "; ".join(there) or "-")
    return table


def table_of_queue(queue: Queue, state: State, estimates: Estimates) -> Table:
    """A line for each run: how it stands, how far it is, how long it takes yet."""
    table = _table("row", "seed", "status", "done", "time left", "last")
    for entry in queue.entries:
        row = queue.row(entry.row)
        length = f"{entry.length:,} {row.unit}" + (" (shortened)" if entry.length < row.length else "")
        done, told = (
            SYSTEMS[row.system].progress(queue.job(entry, state.folder)) if entry.is_open else (entry.length, "")
        )
        progress = f"{done:,} of {length}" if entry.is_open else length
        left = in_words(seconds) if (seconds := _left(queue, state, entry, done, estimates)) is not None else "-"
        status = _status(entry, state)
        table.add_row(entry.row, str(entry.seed), status, progress, left, entry.message or told or "-")
    return table


def _status(entry: Entry, state: State) -> str:
    if entry.status != "running":
        return entry.status
    worker = state.worker()
    if worker is None:
        return "interrupted"
    return "paused" if worker.held else "running"


def _left(queue: Queue, state: State, entry: Entry, done: int, estimates: Estimates) -> float | None:
    """Seconds of training that an entry has before it, by its own curve or else by the estimate."""
    if not entry.is_open:
        return None
    row = queue.row(entry.row)
    own = seconds_per_unit(SYSTEMS[row.system].curve(queue.job(entry, state.folder)), row.unit)
    estimate = estimates.of(row, entry.stock)
    each = own if own is not None else estimate.seconds_per_unit if estimate else None
    return None if each is None else each * max(0, entry.length - done)


def following(job: Job) -> Watch:
    """Prints what the steps of a job write into their logs, as they write it."""
    shown = {path: path.stat().st_size for path in job.folder.glob("*.log")}

    def watch(program: Program) -> None:
        for path in job.folder.glob("*.log"):
            with path.open("rb") as file:
                file.seek(shown.get(path, 0))
                written = file.read()
            shown[path] = shown.get(path, 0) + len(written)
            sys.stderr.buffer.write(written)
            sys.stderr.buffer.flush()

    return watch
