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

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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

from reproduction import display, environment, execution, results, rows
from reproduction.environment import Environment
from reproduction.estimates import Estimates
from reproduction.execution import RunError
from reproduction.job import Job
from reproduction.queueing import Entry, Queue, State
from reproduction.rows import Row
from reproduction.supervision import Program
from reproduction.systems import SYSTEMS
from reproduction.worker import work as work_off

from sd_plugin.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "results" / "cpu.json"
#: The variables that say where the hosts are.
_HOSTS = ("AWD_LSTM_DIR", "TARGER_DIR")
#: Seconds that a queue may take to hold its program, or to start in the background.
_PATIENCE = 20.0

#: Columns of a table that goes to a file.
_WIDTH = 150

_out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
_err = Console(stderr=True, soft_wrap=True, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)


def say(text: str) -> None:
    """Print what is no result."""
    _err.print(text, markup=False)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn what can go wrong into one line and an exit status."""
    try:
        yield
    except UsageError as error:
        say(f"error: {error}")
        raise typer.Exit(2) from None
    except OSError as error:
        say(f"error: {error.filename or ''}: {error.strerror or error}")
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

DATA, RESULTS = ROOT / "data", ROOT / "benchmarks" / "results" / "reproduce"


def state_of(folder: Path | None) -> State:
    """The state in a folder, or in the user's own."""
    return State((folder or platformdirs.user_state_path("sd-plugin") / "reproduce").resolve())


def table_of(path: Path | None) -> tuple[Row, ...]:
    """The rows there are."""
    return rows.ROWS if path is None else rows.read(path)


def length_of(row: Row, epochs: int | None, steps: int | None) -> int:
    """How long a row shall be trained.

    Raises:
        UsageError: it is counted in the other unit, or is not so long.
    """
    given = {"epochs": epochs, "steps": steps}
    wrong = next((unit for unit, value in given.items() if value is not None and unit != row.unit), None)
    if wrong is not None:
        raise UsageError(f"--{wrong}: {row.name} is counted in {row.unit}: give --{row.unit}")
    length = given[row.unit] or row.length
    if length > row.length:
        raise UsageError(f"--{row.unit} {length}: {row.name} has {row.length:,} {row.unit}")
    return length


def entries_of(
    chosen: list[Row],
    seeds: list[int] | None,
    epochs: int | None,
    steps: int | None,
    device: str,
    threads: int | None,
    stock: bool,
    fresh: bool,
    force: bool,
) -> list[Entry]:
    """The runs that a command line asks for: all rows with the first seed, then all with the next."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: must be cpu, cuda or cuda:N")
    return [
        Entry(
            row=row.name,
            seed=row.seed if seed is None else seed,
            length=length_of(row, epochs, steps),
            device=device,
            threads=threads or len(os.sched_getaffinity(0)),
            stock=stock,
            fresh=fresh,
            force=force,
        )
        for seed in seeds or [None]
        for row in chosen
    ]


def queue_of(where: Environment, data: Path, target: Path, table: Path | None, undisturbed: bool = True) -> Queue:
    """An empty queue."""
    variables = {name: str(Path(os.environ[name]).resolve()) for name in _HOSTS if os.environ.get(name)}
    return Queue(
        source=where.source,
        python=where.python,
        commit=where.commit,
        dirty=where.dirty,
        data=data.resolve(),
        results=target.resolve(),
        table=table and table.resolve(),
        variables=variables,
        undisturbed=undisturbed,
        entries=[],
    )


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
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="[default: the host's own]")] = None,
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
        queue = queue_of(where, data, target, table)
        entries = entries_of(
            chosen, None if seed is None else [seed], epochs, steps, device, threads, stock, fresh, force
        )
        if dry_run:
            check_commands([queue.job(entry, Path(tempfile.gettempdir(), "none")) for entry in entries])
            return
        (entry,) = entries
        job = queue.job(entry, state_of(state).folder)
        execution.check(job, queue.data)
        results.check_free(queue.results, entry.row, entry.seed, entry.length, force)
        with execution.prepared(job, queue.data, where.commit, where.dirty, fresh) as record:
            execution.run(job, record, idle=False, watch=showing(job))
            result = execution.finish(job, record, queue.results, undisturbed=True)
        say(f"{result.row}, seed {result.seed}, {result.label}")
        for name, value in result.metrics.items():
            print(f"{name.replace('_', ' ')} {value:.2f}")
        say(f"written to {results.folder_of(queue.results, entry.row, entry.seed)}")


def showing(job: Job) -> Callable[[Program], None]:
    """Prints what the steps of a job write, as they write it."""
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


def check_commands(jobs: list[Job]) -> None:
    """Print the commands of jobs, and have their programs parse them; UsageError if one does not."""
    commands = []
    for job in jobs:
        found = commands_of(job)
        print(*(job.shown(one["command"]) for one in found), sep="\n")
        commands += found
    if problems := problems_of(commands, jobs[0]):
        raise UsageError("; ".join(problems))


def commands_of(job: Job) -> list[dict[str, Any]]:
    """The commands of a job that has not begun, with their variables; UsageError if its host is not here."""
    system = SYSTEMS[job.row.system]
    if problem := system.problem(job):
        raise UsageError(f"{job.row.name}: {problem}")
    steps = [system.step(job, name) for name in system.steps(job)]
    return [{"command": step.command, "variables": dict(step.variables)} for step in steps]


def problems_of(commands: list[dict[str, Any]], job: Job) -> list[str]:
    """What the programs find wrong with commands, parsed by the interpreter of ``job``."""
    checker = job.script("reproduction/check_commands.py")
    done = subprocess.run(checker, input=json.dumps(commands), env=job.environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode and not done.stdout:
        return [f"the commands could not be checked (status {done.returncode})"]
    return done.stdout.splitlines()


@app.command()
def queue(
    names: Annotated[list[str], typer.Argument(metavar="ROW...", help="Rows, or beginnings of their names; fig3.")],
    seed: Annotated[list[int] | None, typer.Option(metavar="N", min=0, help="May be repeated.")] = None,
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
        wanted = entries_of(chosen, seed, epochs, steps, device, threads, stock, fresh, force)
        if kept.worker() is not None:
            if not add:
                raise kept.refusal()
            add_to(kept, wanted)
            return
        if add:
            raise UsageError(f"--add: no queue is running in {kept.folder}")
        old = None if clear else kept.load()
        where = environment_of(kept, old, commit, here)
        made = queue_of(where, data, target, table, undisturbed)
        made.entries = [entry for entry in old.entries if entry.is_open] if old else []
        made.entries += [entry for entry in wanted if not any(entry.is_same_run(other) for other in made.entries)]
        check_entries(made, wanted, kept)
        kept.save(made)
        start(kept, made, background)


def environment_of(state: State, old: Queue | None, commit: str | None, here: bool) -> Environment:
    """Where a queue runs from: what is asked for, which must be that of runs which are left.

    Raises:
        UsageError: it is not, or cannot be had.
    """
    left = old is not None and any(entry.is_open for entry in old.entries)
    if here:
        if commit is not None:
            raise UsageError("--here or --commit? The former takes the checkout as it is")
        where = environment.here(ROOT)
    else:
        named = commit or (old.commit if old is not None and left else "HEAD")
        where = environment.at_commit(ROOT, environment.commit_named(ROOT, named), state.folder / "environments", say)
    if old is not None and left and (old.commit, old.source) != (where.commit, where.source):
        raise UsageError(
            f"the queue in {state.folder} has unfinished runs of commit {old.commit[:12]} in {old.source}: "
            "name the same, or --clear drops them"
        )
    return where


def check_entries(made: Queue, wanted: list[Entry], state: State) -> None:
    """See that hosts and data are there and results are free, before hours are spent; UsageError if not."""
    for entry in wanted:
        execution.check(made.job(entry, state.folder), made.data)
        results.check_free(made.results, entry.row, entry.seed, entry.length, entry.force)


def add_to(state: State, wanted: list[Entry]) -> None:
    """Add runs to the queue that is running."""
    with state.changing() as running:
        check_entries(running, wanted, state)
        new = [entry for entry in wanted if not any(entry.is_same_run(o) and o.is_open for o in running.entries)]
        running.entries = [o for o in running.entries if not any(entry.is_same_run(o) for entry in new)] + new
    say(f"added {len(new)} runs to the queue in {state.folder}")


def start(state: State, made: Queue, background: bool) -> None:
    """Work the queue off, by the interpreter and scripts that it runs from."""
    if state.paused:
        say("the queue is paused; continue goes on with it")
    command = [str(made.python), str(made.source / "scripts" / "reproduce.py"), "work", "--state", str(state.folder)]
    if not background:
        os.execv(command[0], command)
    with state.log.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=state.folder
        )
    deadline = time.monotonic() + _PATIENCE
    while state.worker() is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() not in (None, 0):
        raise UsageError(f"the queue did not start; see {state.log}")
    say(f"running in the background, process {process.pid}; {state.log} and status tell how it goes")


@app.command(hidden=True)
def work(state: StateOption = None) -> None:
    """Work the queue off; what queue and continue start."""
    with told_in_one_line():
        if not work_off(state_of(state), say):
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
        worker = kept.worker()
        running = f"process {worker.pid}" if worker else "not running: continue takes it up"
        paused = "; paused" if kept.paused else ""
        _out.print(f"{kept.folder}: {running}{paused}; commit {loaded.commit[:12]}", markup=False)
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
        while (worker := kept.worker()) is not None and not worker.held:
            if time.monotonic() > deadline:
                raise UsageError(f"process {worker.pid} does not hold its run; see {kept.log}")
            time.sleep(0.1)
        say("paused; its memory stays in use" if worker is not None else "paused; no queue is running")


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
            start(kept, loaded, background)


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
    app()
