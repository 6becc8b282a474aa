"""A program that runs under supervision: it can be held and let go, and never outlives who watches it. Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Seconds between two looks at a program.
INTERVAL = 0.3
#: ``prctl``: the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1

Watch = Callable[["Program"], None]


class Program:
    """A running program, with all processes that it has started: they are a group of their own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.held = False

    def hold(self) -> None:
        """Have it stop where it is: its cores are free at once, its memory stays."""
        if not self.held:
            self._signal(signal.SIGSTOP)
            self.held = True

    def let_go(self) -> None:
        """Have it go on."""
        if self.held:
            self._signal(signal.SIGCONT)
            self.held = False

    def kill(self) -> None:
        """End it, held or not; every file that matters is whole at any moment."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # Its number is not given to another process before it is waited for.
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def be_idle() -> None:
    """Give this process, and those it starts, the lowest priority that there is."""
    os.nice(19)
    # Only what nobody else wants of the cores. Some containers do not allow it.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _idle_session() -> None:
    """Give the session of this process the lowest share of the cores.

    Where Linux groups processes by session (``sched_autogroup``), it shares the cores between the groups first, and a
    priority counts only within its group. To be called by a process that leads a session of its own.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, idle: bool, watch: Watch
) -> int:
    """Run a program until it ends; its exit status, negative after a signal.

    Args:
        folder: its working directory.
        log: what it writes is added to this file.
        idle: run it at the lowest priority.
        watch: called again and again while it runs. Whatever it raises ends the program.
    """
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It died before that took effect.
            os._exit(1)
        if idle:
            be_idle()
            _idle_session()

    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
    program = Program(process)
    try:
        while True:
            watch(program)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(INTERVAL)
    finally:
        program.kill()
