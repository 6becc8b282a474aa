"""The process that the programs of :mod:`.forks` are forked from.

    python fork_server.py MODULE ... < TASKS > STATUSES

It imports the modules that there are, and then runs a task for each line: a JSON object of ``argv``, ``cwd`` and
``environ``, the files ``out`` and ``err`` for what is written, and the ``seconds`` that it may take.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import types
from typing import Any


def main() -> None:
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # What is there already is not looked through again in every fork.
    gc.freeze()
    for line in sys.stdin:
        if os.fork() == 0:
            be(json.loads(line))
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)


def be(task: dict[str, Any]) -> None:
    """Be the process of a program, from its start to its end."""
    signal.alarm(task["seconds"])
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environ"])
    for fd, path in ((0, os.devnull), (1, task["out"]), (2, task["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
    status = 1
    try:
        run(task["argv"])
        status = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    # All that Python does at its end, except for taking apart every module, which takes longer than most programs.
    # Nothing public does it; to join the threads would wait for ever for those of concurrent.futures.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def run(argv: list[str]) -> None:
    """What Python does with these arguments: a script, ``-m MODULE`` or ``-c CODE``, and those of the program."""
    kind, *rest = argv
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(module))
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(kind)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
