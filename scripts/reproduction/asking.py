"""What a command line asks for: rows, how often and how long, where and from what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from machine_limits import check_device, check_threads

from sd_plugin.errors import UsageError

from .environment import Environment
from .queueing import Entry, Queue
from .rows import Row

#: The variables that say where the hosts' checkouts are.
_HOSTS = ("AWD_LSTM_DIR", "TARGER_DIR")


@dataclass(frozen=True)
class Request:
    """The options of ``run`` and ``queue`` that each run has; None where the row or the machine decides."""

    seeds: list[int] | None = None
    epochs: int | None = None
    steps: int | None = None
    device: str = "cpu"
    threads: int | None = None
    stock: bool = False
    fresh: bool = False
    force: bool = False

    def entries(self, chosen: list[Row]) -> list[Entry]:
        """The runs of rows: all with the first seed, then all with the next.

        Raises:
            UsageError: an option is not valid, or not for one of the rows.
        """
        check_device(self.device)
        if self.threads is not None:
            check_threads(self.threads)
        wanted: list[int | None] = [*self.seeds] if self.seeds else [None]
        return [
            Entry(
                row=row.name,
                seed=row.seed if seed is None else seed,
                length=self._length(row),
                device=self.device,
                threads=self.threads or len(os.sched_getaffinity(0)),
                stock=self.stock,
                fresh=self.fresh,
                force=self.force,
            )
            for seed in wanted
            for row in chosen
        ]

    def _length(self, row: Row) -> int:
        """How long a row shall be trained; UsageError if it is counted in the other unit, or is not so long."""
        given = {"epochs": self.epochs, "steps": self.steps}
        wrong = next((unit for unit, value in given.items() if value is not None and unit != row.unit), None)
        if wrong is not None:
            raise UsageError(f"--{wrong}: {row.name} is counted in {row.unit}: give --{row.unit}")
        length = given[row.unit] or row.length
        if length > row.length:
            raise UsageError(f"--{row.unit} {length}: {row.name} has {row.length:,} {row.unit}")
        return length


def empty_queue(where: Environment, data: Path, results: Path, table: Path | None, undisturbed: bool = True) -> Queue:
    """A queue without runs; arguments as :class:`Queue` has them, but paths may be relative."""
    variables = {name: str(Path(os.environ[name]).resolve()) for name in _HOSTS if os.environ.get(name)}
    return Queue(
        source=where.source,
        python=where.python,
        commit=where.commit,
        dirty=where.dirty,
        data=data.resolve(),
        results=results.resolve(),
        table=table and table.resolve(),
        variables=variables,
        undisturbed=undisturbed,
        entries=[],
    )
