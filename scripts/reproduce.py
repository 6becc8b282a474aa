#!/usr/bin/env python
"""The rows of the paper's tables, each by one command, and many of them one after the other in a queue.

    python scripts/reproduce.py list
    python scripts/reproduce.py run table1/medium/nr_rh_st
    python scripts/reproduce.py queue fig3 small/multi30k --seed 1 --seed 2 --background
    python scripts/reproduce.py status
    python scripts/reproduce.py pause
    python scripts/reproduce.py continue --background
    python scripts/reproduce.py table

A row is run by the commands that users type, as the paper has it, or shortened by --epochs or --steps, which the result
says. Results go to benchmarks/results/reproduce/ROW/seedN, and `table` makes docs/results.md of them. A queue runs at
the lowest priority, from a commit that is exported and installed for it alone, so that edits of the checkout cannot
disturb it.
Whatever stops a run, the same command goes on where it was: Zaremba's to the same bits, OpenNMT-py from its last
checkpoint, AWD-LSTM from its best epoch, targer from the start; the result says what was repeated.

Exit status: 0 done, 1 a run failed or a page is out of date, 2 wrong use, 130 interrupted.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    # Not all are used here, but all in the modules of `reproduction`.
    import platformdirs
    import pydantic  # noqa: F401
    import typer
    import yaml  # noqa: F401
    from rich.console import Console

    import sd_plugin  # noqa: F401
except ImportError:
    print("reproduce.py needs sd-plugin and what it is built on: pip install '.[reproduce]'", file=sys.stderr)
    raise SystemExit(2) from None

from reproduction import display, environment, execution, results, rows, starting, worker
from reproduction import dry_run as dry_runs
from reproduction.asking import Request, empty_queue
from reproduction.estimates import Estimates
from reproduction.execution import RunError
from reproduction.queueing import State
from reproduction.rows import Row
from typer_program import run_app

from sd_plugin.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "results" / "cpu.json"
#: Seconds that a queue may take to hold its program.
_PATIENCE = 20.0
#: Columns of a table that goes to a file.
_WIDTH = 150

_out = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
#: With a mark before the paragraph of commands, which says that its lines stay as they are.
_HELP = (__doc__ or "").replace("\n\n    python", "\n\n\b\n    python")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=_HELP)


def say(text: str) -> None:
    """Print what is no result."""
    _err.print(text)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn what can go wrong into one line and an exit status."""
    try:
        yield
    except UsageError as error:
        say(f"error: {error}")
        raise typer.Exit(2) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror or error}")
        raise typer.Exit(2) from None
    except RunError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it was")
        raise typer.Exit(130) from None


# ------------------------------------------------------------------------------------------------ options

StateOption = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="Folder of queue and runs.  [default: the user's, of this system]"),
]
DataOption = Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of the corpora.")]
ResultsOption = Annotated[Path, typer.Option("--results", metavar="DIR", help="Folder of the results.")]
TableOption = Annotated[Path | None, typer.Option("--rows", hidden=True, help="A JSON file of rows instead.")]
EpochsOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N epochs: a shortened run.")]
StepsOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N steps: a shortened run.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.  [default: usable cores]")]
StockOption = Annotated[
    bool, typer.Option("--stock", help="Zaremba's baseline on PyTorch's own modules, not our dense kernels.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Discard what an unfinished run has left.")]
UndisturbedOption = Annotated[
    bool, typer.Option("--undisturbed", help="At normal priority: nothing else runs, and times are to count.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a result that is there.")]

#: Largest seed that all hosts take.
SEED_MAX = 2**32 - 1
DATA, RESULTS = ROOT / "data", ROOT / "benchmarks" / "results" / "reproduce"


def state_of(folder: Path | None) -> State:
    """The state in a folder, or in the user's own."""
    return State((folder or platformdirs.user_state_path("sd-plugin") / "reproduce").resolve())


def table_of(path: Path | None) -> tuple[Row, ...]:
    """The rows there are."""
    return rows.ROWS if path is None else rows.read(path)


# ----------------------------------------------------------------------------------------------- commands


@app.command("list")
def list_(target: ResultsOption = RESULTS, table: TableOption = None) -> None:
    """Show every row, what it runs, the paper's figures, and how long it takes here."""
    with told_in_one_line():
        saved = list(results.scan(target))
        _out.print(display.table_of_rows(table_of(table), saved, Estimates(saved, BENCHMARK)))


@app.command()
def run(
    row: Annotated[str, typer.Argument(metavar="ROW", help="One that list shows.")],
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=SEED_MAX, help="[default: the host's own]")
    ] = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    stock: StockOption = False,
    fresh: FreshOption = False,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, and see that their programs take them.")
    ] = False,
    data: DataOption = DATA,
    target: ResultsOption = RESULTS,
    state: StateOption = None,
    table: TableOption = None,
) -> None:
    """Run a row, with this checkout and interpreter as they are."""
    with told_in_one_line():
        chosen = rows.select([row], table_of(table))
        if len(chosen) > 1 and not dry_run:
            raise UsageError(f"{row} stands for {', '.join(one.name for one in chosen)}: name one, or use queue")
        where = environment.here(ROOT)
        queue = empty_queue(where, data, target, table)
        seeds = None if seed is None else [seed]
        entries = Request(seeds, epochs, steps, device, threads, stock, fresh, force).entries(chosen)
        if dry_run:
            # None of them has begun there.
            dry_runs.show_and_check([queue.job(entry, Path(tempfile.gettempdir(), "none")) for entry in entries])
            return
        (entry,) = entries
        job = queue.job(entry, state_of(state).folder)
        execution.check(job, queue.data)
        results.check_free(queue.results, entry.row, entry.seed, entry.length, force)
        with execution.prepared(job, queue.data, where.commit, where.dirty, fresh) as record:
            execution.run(job, record, idle=False, watch=display.following(job))
            result = execution.finish(job, record, queue.results, undisturbed=True)
        say(f"{result.row}, seed {result.seed}, {result.label}")
        for name, value in result.metrics.items():
            print(f"{name.replace('_', ' ')} {value:.2f}")
        say(f"written to {results.folder_of(queue.results, entry.row, entry.seed)}")


@app.command()
def queue(
    names: Annotated[list[str], typer.Argument(metavar="ROW...", help="Rows, or beginnings of their names; fig3.")],
    seed: Annotated[list[int] | None, typer.Option(metavar="N", min=0, max=SEED_MAX, help="May be repeated.")] = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    stock: StockOption = False,
    fresh: FreshOption = False,
    force: ForceOption = False,
    commit: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run from this commit.  [default: the queue's, else HEAD]")
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Run from this checkout and interpreter, which must not change then.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="Add the rows to the queue that is running.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Drop what is left of an earlier queue.")] = False,
    undisturbed: UndisturbedOption = False,
    background: Annotated[bool, typer.Option("--background", help="Return at once; queue.log tells.")] = False,
    data: DataOption = DATA,
    target: ResultsOption = RESULTS,
    state: StateOption = None,
    table: TableOption = None,
) -> None:
    """Run rows one after the other at the lowest priority, each from where it is."""
    with told_in_one_line():
        kept = state_of(state)
        chosen = rows.select(names, table_of(table))
        wanted = Request(seed, epochs, steps, device, threads, stock, fresh, force).entries(chosen)
        if kept.worker() is not None:
            if not add:
                raise kept.refusal()
            say(f"added {starting.add(kept, wanted)} runs to the queue in {kept.folder}")
            return
        if add:
            raise UsageError(f"--add: no queue is running in {kept.folder}")
        old = None if clear else kept.load()
        where = starting.environment_of(ROOT, kept, old, commit, here, say)
        made = empty_queue(where, data, target, table, undisturbed)
        starting.fill(made, old, wanted, kept)
        starting.start(kept, made, background, say)


@app.command(hidden=True)
def work(state: StateOption = None) -> None:
    """Work the queue off; what queue and continue start."""
    with told_in_one_line():
        if not worker.work(state_of(state), say):
            raise typer.Exit(1)


@app.command()
def status(state: StateOption = None) -> None:
    """Show the runs of the queue: progress, time left, last metric."""
    with told_in_one_line():
        kept = state_of(state)
        loaded = kept.load()
        if loaded is None:
            say(f"there is no queue in {kept.folder}")
            return
        process = kept.worker()
        running = f"process {process.pid}" if process else "not running: continue takes it up"
        paused = "; paused" if kept.paused else ""
        _out.print(f"{kept.folder}: {running}{paused}; commit {loaded.commit[:12]}")
        saved = list(results.scan(loaded.results))
        _out.print(display.table_of_queue(loaded, kept, Estimates(saved, BENCHMARK)))


@app.command()
def pause(state: StateOption = None) -> None:
    """Hold the queue where it is, which frees the cores at once; it stays so after a reboot."""
    with told_in_one_line():
        kept = state_of(state)
        if kept.load() is None:
            raise UsageError(f"there is no queue in {kept.folder}")
        kept.paused = True
        deadline = time.monotonic() + _PATIENCE
        while (process := kept.worker()) is not None and not process.held:
            if time.monotonic() > deadline:
                say(f"process {process.pid} is between two programs, and will hold the next")
                return
            time.sleep(0.1)
        say("paused; its memory stays in use" if process is not None else "paused; no queue is running")


@app.command("continue")
def continue_(
    background: Annotated[bool, typer.Option("--background", help="Return at once; queue.log tells.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Take up failed runs too.")] = False,
    state: StateOption = None,
) -> None:
    """Go on after a pause, a kill or a reboot."""
    with told_in_one_line():
        kept = state_of(state)
        with kept.changing() as loaded:
            for entry in loaded.entries:
                if retry and entry.status == "failed":
                    entry.status, entry.message = "waiting", ""
        was, kept.paused = kept.paused, False
        if kept.worker() is not None:
            say("the queue goes on" if was else "the queue is running")
        elif kept.next() is None:
            say("nothing is left to do")
        else:
            starting.start(kept, loaded, background, say)


@app.command()
def prepare(
    commit: Annotated[str, typer.Option(metavar="NAME", help="The commit.")] = "HEAD", state: StateOption = None
) -> None:
    """Export and install a commit for a queue, which queue does by itself."""
    with told_in_one_line():
        folder = state_of(state).folder / "environments"
        made = environment.at_commit(ROOT, environment.commit_named(ROOT, commit), folder, say)
        print(made.source.parent)


@app.command("table")
def table_(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is out of date.")] = False,
    target: ResultsOption = RESULTS,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the page.")] = ROOT / "docs",
) -> None:
    """Write the page of results and its figure, from the results alone."""
    # matplotlib takes longer to import than the other commands to run.
    from reproduction import page

    with told_in_one_line():
        saved = list(results.scan(target))
        known = {row.name for row in rows.ROWS}
        for run in saved:
            if run.result.row not in known:
                raise UsageError(f"{run.folder}: there is no row {run.result.row}")
        if not check:
            for path in page.write(saved, out):
                print(path)
            return
        path = out / page.PAGE
        if not path.exists() or path.read_text(encoding="utf-8") != page.text(saved, path):
            say(f"{path} is out of date: run python scripts/reproduce.py table")
            raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app, "reproduce.py")
