"""The queue as files in a folder of its own, outside the checkout: it outlives processes and reboots."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from whole_file import write_whole

from sd_plugin.errors import UsageError

from . import rows
from .execution import folder_of
from .job import Job
from .rows import Row


class Entry(BaseModel):
    """A run in the queue: its job, how it stands, and what is to be said of that."""

    model_config = ConfigDict(extra="forbid")

    row: str
    seed: int
    length: int
    device: str
    threads: int
    stock: bool
    fresh: bool = False
    force: bool = False
    status: Literal["waiting", "running", "done", "failed"] = "waiting"
    message: str = ""

    @property
    def is_open(self) -> bool:
        """Whether something is left to do. One that was running when its queue was killed goes on."""
        return self.status in ("waiting", "running")

    def is_same_run(self, other: Entry) -> bool:
        return (self.row, self.seed, self.length) == (other.row, other.seed, other.length)


class Queue(BaseModel):
    """``queue.json``.

    Attributes:
        source, python, commit, dirty: the environment of all its runs.
        data: the folder of the corpora; results: where results go.
        table: a file of rows that replaces the table; None for the paper's rows.
        variables: of the environment, where the hosts' checkouts are.
        undisturbed: run at normal priority, so that times count.
        entries: in the order in which they are run.
    """

    model_config = ConfigDict(extra="forbid")

    source: Path
    python: Path
    commit: str
    dirty: bool
    data: Path
    results: Path
    table: Path | None
    variables: dict[str, str]
    undisturbed: bool
    entries: list[Entry]

    def row(self, name: str) -> Row:
        """A row of its table by its full name."""
        known = rows.ROWS if self.table is None else rows.read(self.table)
        return next(row for row in known if row.name == name)

    def job(self, entry: Entry, state: Path) -> Job:
        """The job of an entry."""
        return Job(
            row=self.row(entry.row),
            seed=entry.seed,
            length=entry.length,
            device=entry.device,
            threads=entry.threads,
            stock=entry.stock,
            folder=folder_of(state, entry.row, entry.seed, entry.length),
            source=self.source,
            python=self.python,
        )


class Worker(BaseModel):
    """``worker.json``: the process that works the queue off, and whether its program is held."""

    pid: int
    held: bool = False


class State:
    """The folder of the queue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "queue.log"
        self._queue = folder / "queue.json"
        self._worker = folder / "worker.json"
        self._lock = folder / "lock"
        self._paused = folder / "paused"

    def load(self) -> Queue | None:
        """The queue, None if there is none; UsageError if its file is not one."""
        try:
            return Queue.model_validate_json(self._queue.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise UsageError(f"{self._queue} is no queue of this version ({error.errors()[0]['msg']})") from None

    def save(self, queue: Queue) -> None:
        """Replace the queue."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._queue, queue.model_dump_json(indent=1) + "\n")

    @contextlib.contextmanager
    def changing(self) -> Iterator[Queue]:
        """The queue, to be changed and saved while no other process does."""
        if not self._queue.exists():
            raise UsageError(f"there is no queue in {self.folder}")
        with self._locked(self.folder / "queue.lock", wait=True):
            queue = self.load()
            assert queue is not None, "nothing removes it"
            yield queue
            self.save(queue)

    def mark(self, entry: Entry) -> None:
        """Save how an entry stands."""
        with self.changing() as queue:
            queue.entries = [entry if entry.is_same_run(other) else other for other in queue.entries]

    def next(self) -> Entry | None:
        """The first entry with something left to do."""
        queue = self.load()
        return next((entry for entry in queue.entries if entry.is_open), None) if queue else None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one process that works this queue off. If killed, the system lets go.

        Raises:
            UsageError: another process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(self._lock, wait=False):
            write_whole(self._worker, Worker(pid=os.getpid()).model_dump_json() + "\n")
            yield

    @contextlib.contextmanager
    def _locked(self, path: Path, wait: bool) -> Iterator[None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.refusal() from None
            yield
        finally:
            os.close(descriptor)

    def refusal(self) -> UsageError:
        """Why a second queue is refused."""
        worker = self.worker()
        named = f", process {worker.pid}" if worker else ""
        return UsageError(f"a queue is running in {self.folder}{named}: queue --add gives it more rows")

    def worker(self) -> Worker | None:
        """The process that works the queue off; None if there is none."""
        while self._is_locked():
            with contextlib.suppress(FileNotFoundError):
                worker = Worker.model_validate_json(self._worker.read_bytes())
                if Path("/proc", str(worker.pid)).exists():
                    return worker
            # It has not yet written who it is: what is there is of one that was killed.
            time.sleep(0.01)
        return None

    def _is_locked(self) -> bool:
        if not self._lock.exists():
            return False
        descriptor = os.open(self._lock, os.O_RDWR)
        try:
            # A shared lock, so that two who ask at once do not take each other for a queue.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def tell_held(self, held: bool) -> None:
        """Say, as the process that works the queue off, whether its program is held."""
        write_whole(self._worker, Worker(pid=os.getpid(), held=held).model_dump_json() + "\n")

    @property
    def paused(self) -> bool:
        """Whether it shall stand still."""
        return self._paused.exists()

    @paused.setter
    def paused(self, wanted: bool) -> None:
        if wanted:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._paused.touch()
        else:
            self._paused.unlink(missing_ok=True)
