"""Filling a queue, and starting the process that works it off."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from sd_plugin.errors import UsageError

from . import environment, execution, results
from .environment import Environment, Say
from .queueing import Entry, Queue, State

#: Seconds that a queue may take to start in the background.
_PATIENCE = 20.0


def environment_of(
    root: Path, state: State, old: Queue | None, commit: str | None, here: bool, say: Say
) -> Environment:
    """Where a queue runs from: what is asked for, which must be that of runs which are left.

    Args:
        root: this checkout.
        old: the queue there is, None to begin anew.
        commit: by any name; None is that of ``old`` if it has runs left, else HEAD. here: this checkout as it is.

    Raises:
        UsageError: it is not, or cannot be had.
    """
    left = old is not None and any(entry.is_open for entry in old.entries)
    if here:
        if commit is not None:
            raise UsageError("--here or --commit? The former takes the checkout as it is")
        where = environment.here(root)
    else:
        named = commit or (old.commit if old is not None and left else "HEAD")
        folder = state.folder / "environments"
        where = environment.at_commit(root, environment.commit_named(root, named), folder, say)
    if old is not None and left and (old.commit, old.source) != (where.commit, where.source):
        raise UsageError(
            f"the queue in {state.folder} has unfinished runs of commit {old.commit[:12]} in {old.source}: "
            "name the same, or --clear drops them"
        )
    return where


def fill(made: Queue, old: Queue | None, wanted: Sequence[Entry], state: State) -> None:
    """Put what is left of the old queue, and what is wanted besides, into a new one, and save it.

    Raises:
        UsageError: something that a run needs is missing, or its result is there.
    """
    made.entries = [entry for entry in old.entries if entry.is_open] if old else []
    made.entries += [entry for entry in wanted if not any(entry.is_same_run(other) for other in made.entries)]
    _check(made, wanted, state)
    state.save(made)


def add(state: State, wanted: Sequence[Entry]) -> int:
    """Add runs to the queue that is running; how many were not in it. Errors as :func:`fill`."""
    with state.changing() as running:
        _check(running, wanted, state)
        new = [entry for entry in wanted if not any(entry.is_same_run(o) and o.is_open for o in running.entries)]
        kept = [old for old in running.entries if not any(old.is_same_run(entry) for entry in new)]
        running.entries = [*kept, *new]
    return len(new)


def _check(queue: Queue, wanted: Sequence[Entry], state: State) -> None:
    """See that hosts and data are there and results are free, before hours are spent."""
    for entry in wanted:
        execution.check(queue.job(entry, state.folder), queue.data)
        results.check_free(queue.results, entry.row, entry.seed, entry.length, entry.force)


def start(state: State, queue: Queue, background: bool, say: Say) -> None:
    """Work the queue off, by the interpreter and scripts that it runs from. Returns only if in the background.

    Raises:
        UsageError: it ended at once.
    """
    if state.paused:
        say("the queue is paused; continue goes on with it")
    script = queue.source / "scripts" / "reproduce.py"
    command = [str(queue.python), str(script), "work", "--state", str(state.folder)]
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
