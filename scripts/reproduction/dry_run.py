"""The commands of runs, printed and parsed by their programs, but not run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from sd_plugin.errors import UsageError

from .job import Job
from .systems import SYSTEMS


def show_and_check(jobs: Sequence[Job]) -> None:
    """Print the commands of jobs, and see that their programs take them.

    Raises:
        UsageError: a host is not here, or a program does not take its command.
    """
    commands: list[dict[str, Any]] = []
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


def problems_of(commands: Sequence[dict[str, Any]], job: Job) -> list[str]:
    """What the programs find wrong with commands, parsed by the interpreter of ``job``."""
    checker = job.script("reproduction/check_commands.py")
    done = subprocess.run(checker, input=json.dumps(commands), env=job.environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode and not done.stdout:
        return [f"the commands could not be checked (status {done.returncode})"]
    return done.stdout.splitlines()
