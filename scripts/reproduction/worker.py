"""The process that works a queue off, one run after the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from sd_plugin.errors import UsageError

from . import execution, results, supervision
from .environment import Say
from .execution import RunError
from .queueing import Entry, Queue, State
from .supervision import Program


def work(state: State, say: Say) -> bool:
    """Work the queue off until nothing is left to do, holding whenever it is paused.

    Whatever ends this process, :func:`work` goes on from there another time.

    Returns:
        Whether every run came to its end.

    Raises:
        UsageError: another process works it off, or there is no queue.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with state.held():
        queue = state.load()
        if queue is None:
            raise UsageError(f"there is no queue in {state.folder}")
        if not queue.undisturbed:
            supervision.be_idle()
        os.environ.update(queue.variables)
        while True:
            _wait_while_paused(state)
            entry = state.next()
            if entry is None:
                break
            _one(state, entry, say)
        queue = state.load()
        return queue is not None and all(entry.status == "done" for entry in queue.entries)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_while_paused(state: State) -> None:
    if state.paused:
        state.tell_held(True)
        while state.paused:
            time.sleep(supervision.INTERVAL)
        state.tell_held(False)


def _one(state: State, entry: Entry, say: Say) -> None:
    """Run an entry, and mark how it ended."""
    entry.status, entry.message = "running", ""
    state.mark(entry)
    # Read anew: rows may have been added, with other variables.
    queue = state.load()
    assert queue is not None
    say(f"{entry.row}, seed {entry.seed}: begins")
    try:
        entry.message = _result_of(queue, state, entry)
        entry.status = "done"
    except (RunError, UsageError, OSError) as error:
        entry.status, entry.message = "failed", " ".join(str(error).split())
    state.mark(entry)
    say(f"{entry.row}, seed {entry.seed}: {entry.status}, {entry.message}")


def _result_of(queue: Queue, state: State, entry: Entry) -> str:
    """Make an entry's result; what came out, in words."""
    job = queue.job(entry, state.folder)
    execution.check(job, queue.data)
    results.check_free(queue.results, entry.row, entry.seed, entry.length, entry.force)
    with execution.prepared(job, queue.data, queue.commit, queue.dirty, entry.fresh) as record:
        if entry.fresh:
            # Only once: if it is interrupted, it goes on.
            entry.fresh = False
            state.mark(entry)
        execution.run(job, record, idle=not queue.undisturbed, watch=_holding(state))
        result = execution.finish(job, record, queue.results, queue.undisturbed)
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in result.metrics.items())


def _holding(state: State) -> Callable[[Program], None]:
    """Holds a program while the queue is paused."""

    def watch(program: Program) -> None:
        wanted, was = state.paused, program.held
        if wanted != was:
            (program.hold if wanted else program.let_go)()
            state.tell_held(wanted)

    return watch
