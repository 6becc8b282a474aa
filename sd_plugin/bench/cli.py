"""The command line of ``sd-plugin bench``: options, progress, tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.main import get_command

from .. import kernels
from ..errors import UsageError
from . import machine, results, runner, summary
from .columns import COLUMNS, DEFAULT_PRECISIONS, PRECISIONS, VALID_PRECISIONS
from .registry import HOSTS, WORKLOADS

#: Width of tables where the output is not a terminal; no cell is broken at it.
_WIDTH = 200
INTERRUPTED = 130
#: Longest message of typer that is shown whole: it quotes what was given.
_MESSAGE = 300

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def bench(
    context: typer.Context,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"What to train: all (default), or of {', '.join(WORKLOADS)}.")
    ] = None,
    columns: Annotated[list[str] | None, typer.Option(help=f"Which columns: of {', '.join(COLUMNS)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of {', '.join(PRECISIONS)}; fp16 and bf16 by autocast, without loss scaling. The CPU has "
            f"{', '.join(VALID_PRECISIONS['cpu'])} alone. Default on cuda: {', '.join(DEFAULT_PRECISIONS['cuda'])}."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch. Default: as torch chooses, at most one a processor.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds over all columns.")] = 10,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Write everything here, after every workload.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --json if it exists.")] = False,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="One LSTM layer against p, H, B and T, too.")] = False,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help=f"A checkout to be stock: {', '.join(HOSTS)}."),
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each column in a process of its own.")] = True,
    phases: Annotated[bool, typer.Option(help="Time FP, BP and WG by themselves; the bounds need it.")] = True,
    seed: Annotated[int, typer.Option(help="Of parameters, data and dropout.")] = 1,
    scale: Annotated[str, typer.Option(hidden=True, help="tiny: small shapes, to test this program.")] = "full",
) -> None:
    """Time whole training steps: stock, our kernels with nothing skipped, NR+ST and NR+RH+ST, side by side.

    Lists may be given as "a,b" or by repeating the option. Use an idle machine, and compare runs of one file only.
    """
    settings = runner.Settings(
        workloads=_chosen("--workload", workload, WORKLOADS),
        columns=_chosen("--columns", columns, COLUMNS),
        device=_device(device),
        precisions=_precisions(precision, device),
        threads=_usual_threads() if threads is None else _threads(threads),
        repeats=_at_least("--repeats", repeats, 1),
        warmup=_at_least("--warmup", warmup, 0),
        seed=_at_most("--seed", _at_least("--seed", seed, 0), 2**63 - 1),
        memory=memory,
        phases=phases,
        sweeps=sweeps,
        tiny=_one_of("--scale", scale, ("full", "tiny")) == "tiny",
        hosts=_hosts(host or []),
        command=machine.command(context.obj),
    )
    if json is not None:
        results.check_target(json, force)
    measure(settings, json)


def _one_of(option: str, value: str, valid: Iterable[str]) -> str:
    if value not in (names := list(valid)):
        raise UsageError(f"{option} {value!r} is not valid; valid: {', '.join(names)}")
    return value


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise UsageError(f"{option} must be at least {least}, got {value}")
    return value


def _at_most(option: str, value: int, most: int) -> int:
    if value > most:
        # Thousands of digits are no better than some.
        raise UsageError(f"{option} must be at most {most}, got {str(value)[:30]}{'...' * (value >= 10**30)}")
    return value


def _threads(value: int) -> int:
    # With more than the system gives a process, OpenMP ends in a segmentation fault.
    return _at_most("--threads", _at_least("--threads", value, 1), os.cpu_count() or 1)


def _usual_threads() -> int:
    # Without MKL, or with MKL_DYNAMIC=false, torch takes whatever the environment asks for.
    return min(torch.get_num_threads(), os.cpu_count() or 1)


def _chosen(option: str, given: Sequence[str] | None, valid: Iterable[str]) -> list[str]:
    """The names asked for, in the order of ``valid``; all of them if none was, or ``all``."""
    names = list(valid)
    asked = [name.strip() for text in given or ["all"] for name in text.split(",")]
    for name in asked:
        _one_of(option, name, ("all", *names))
    return names if "all" in asked else [name for name in names if name in asked]


def _precisions(given: Sequence[str] | None, device: str) -> list[str]:
    """As :func:`_chosen`, of those that ``device`` has; its defaults if none was asked for."""
    if given is None:
        return list(DEFAULT_PRECISIONS[device])
    return _chosen(f"--device {device} --precision", given, VALID_PRECISIONS[device])


def _device(name: str) -> str:
    _one_of("--device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; valid: cpu")
    try:
        kernels.choose("lstm", torch.device(name), torch.float32, counted=False)
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None
    return name


def _hosts(given: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals:
            raise UsageError(f"--host {text!r} is not NAME=DIR; NAME is one of {', '.join(HOSTS)}")
        _one_of("--host", name, HOSTS)
        if not Path(folder).is_dir():
            raise UsageError(f"--host {name}: there is no folder {folder}")
        folders[name] = Path(folder).resolve()
    return folders


def measure(settings: runner.Settings, json: Path | None) -> None:
    """Run, show progress on standard error and tables on standard output."""
    error = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=error,
        disable=not error.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=runner.parts(settings))

        def tell(title: str | None) -> None:
            if title is None:
                bar.advance(task)
                return
            bar.update(task, description=title)
            if not error.is_terminal:
                error.print(title)

        def keep(document: results.Document) -> None:
            if json is not None:
                results.save(document, json)

        try:
            document = runner.run(settings, tell, keep)
        except KeyboardInterrupt:
            kept = f"; the finished workloads are in {json}" if json is not None and json.exists() else ""
            error.print(f"sd-plugin bench: interrupted{kept}")
            raise typer.Exit(INTERRUPTED) from None
    show(document)


def show(document: results.Document) -> None:
    """Print the tables, and what they must be read with."""
    out = Console(highlight=False, markup=False, emoji=False)
    if not out.is_terminal:
        out = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
    for line in summary.head(document):
        out.print(line, soft_wrap=True)
    for table in summary.tables(document):
        shown = Table(title=table.title)
        for i, name in enumerate(table.heading):
            shown.add_column(name, justify="left" if i < 2 else "right", no_wrap=not out.is_terminal)
        above = ""
        for name, *cells in table.rows:
            if above and name != above:
                shown.add_section()
            shown.add_row(name if name != above else "", *cells)
            above = name
        out.print(shown)
    for line in summary.notes(document):
        out.print(line, soft_wrap=True)


def run(argv: Sequence[str]) -> int:
    """The program with ``argv``; its exit code.

    Raises:
        UsageError: an argument is not valid.
    """
    arguments = list(argv)
    command = get_command(app)
    try:
        return int(command.main(args=arguments, prog_name="sd-plugin bench", standalone_mode=False, obj=arguments) or 0)
    except UsageError:
        raise
    except Exception as error:
        # typer's own complaints, whichever class its version gives them.
        if hasattr(error, "format_message"):
            text = " ".join(error.format_message().split())
            raise UsageError(text if len(text) <= _MESSAGE else f"{text[: _MESSAGE - 60]} ... {text[-50:]}") from None
        raise
