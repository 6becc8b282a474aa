"""Programs in forks of one Python that has imported torch: it takes longer to import than most of what tests run.

Not for programs whose start is what is tested: the start-up files have been read, by a process without the variables
of the plugin, and torch has taken its number of threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .patience import PATIENCE

#: What the programs import of other libraries. Of this one nothing, since it reads variables as it is imported.
IMPORTED = ("numpy", "torch", "torch._dynamo", "torch.optim", "pydantic", "rich.console", "typer", "yaml")

_SERVER = """
import contextlib, gc, importlib, json, os, runpy, signal, sys
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# What is there already is not looked through again in every fork, above all as it ends.
gc.freeze()
for line in sys.stdin:
    task = json.loads(line)
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
signal.alarm(task["seconds"])
os.chdir(task["cwd"])
os.environ.clear()
os.environ.update(task["environ"])
for fd, path in ((0, os.devnull), (1, task["out"]), (2, task["err"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
sys.argv, sys.path[0] = task["argv"], os.path.dirname(task["argv"][0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Forks:
    """Runs scripts as ``subprocess.run([sys.executable, script, …])`` would, without its start."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server = server
        self._out, self._err = folder / "out", folder / "err"

    def __call__(
        self, script: Path, arguments: Sequence[object], *, cwd: Path, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end; it is killed by SIGALRM if it takes too long.

        Args:
            cwd: its working directory.
            env: all of its environment.
        """
        self._out.write_text("")
        self._err.write_text("")
        task = {
            "argv": [str(script), *map(str, arguments)],
            "cwd": str(cwd),
            "environ": dict(env),
            "out": str(self._out),
            "err": str(self._err),
            "seconds": int(PATIENCE),
        }
        assert self._server.stdin and self._server.stdout
        print(json.dumps(task), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(task["argv"], status, self._out.read_text(), self._err.read_text())


@contextmanager
def forks(folder: Path, env: Mapping[str, str]) -> Iterator[Forks]:
    """A server of forks, with a folder for what they print.

    Args:
        env: the environment in which torch is imported.
    """
    command = [sys.executable, "-c", _SERVER, *IMPORTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)) as server:
        yield Forks(server, folder)
        assert server.stdin
        server.stdin.close()
