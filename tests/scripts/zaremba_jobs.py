"""Runs trainings in processes forked from one that has imported everything, which saves seconds for each.

    python zaremba_jobs.py JOBS > RESULTS.json

``JOBS`` is JSON: a list of steps, a step a list of jobs that run at the same time. A job has ``arguments`` of
zaremba_main.py and may have ``environment``, ``kill`` = [function, n]: kill -9 when it is called for the n-th time, and
``copy`` = [folder, copy]: made when the step has ended. The output is a list of {status, output}, in order; the status
is -9 after the kill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import torch
import torch._dynamo  # each optimizer would import it
import zaremba_main

#: Name of a function to be killed in -> who has it. (A path of Python 3.10 does not look up what it calls of ``os``.)
OWNERS: dict[str, Any] = {"fsync": os, "replace": Path, "step": torch.optim.SGD}


def arm(name: str, count: int) -> None:
    """Have the ``count``-th call of a function kill this process instead."""
    owner = OWNERS[name]
    function, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, deadly)


def run(job: dict[str, Any], output: int) -> None:
    """Be the process of a job."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job.get("environment", {}))
    if job.get("kill"):
        arm(*job["kill"])
    sys.argv = ["zaremba_main.py", *job["arguments"]]
    zaremba_main.app()


def fork(job: dict[str, Any], output: int) -> int:
    """Start the process of a job; its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        run(job, output)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 0
    finally:
        sys.stdout.flush()
        # Not sys.exit: that would return into the parent's program.
        os._exit(status)


def main() -> None:
    results = []
    for step in json.loads(sys.argv[1]):
        outputs = [tempfile.TemporaryFile() for _ in step]  # noqa: SIM115 - they end with this process
        children = [fork(job, output.fileno()) for job, output in zip(step, outputs, strict=True)]
        for child, job, output in zip(children, step, outputs, strict=True):
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            results.append({"status": status, "output": output.read().decode()})
            if job.get("copy"):
                shutil.copytree(*job["copy"])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
