"""Programs in forks of one Python that has imported torch: it takes longer to import than most of what tests run.

Not for programs whose start is what is tested: the start-up files have been read, by a process without the variables
of the plugin, and torch has taken its number of threads. (``-m sd_plugin PROGRAM`` reads those variables again.) Nor
for what must not, or cannot, import something: it is there already.
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
IMPORTED = (
    *("numpy", "torch", "torch._dynamo", "torch.optim"),
    *("matplotlib.pyplot", "pydantic", "rich.console", "typer", "yaml"),
)

_SERVER = Path(__file__).with_name("fork_server.py")


class Forks:
    """Runs programs as ``subprocess.run([sys.executable, program, …])`` would, without its start."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server = server
        self._out, self._err = folder / "out", folder / "err"

    def __call__(
        self, program: Path | str, arguments: Sequence[object], *, cwd: Path, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; it is killed by SIGALRM if it takes too long.

        Args:
            program: a script; or ``-m`` or ``-c``, and the first of the arguments is a module or code.
            cwd: its working directory.
            env: all of its environment. What Python itself would read of it has no effect.
        """
        self._out.write_text("")
        self._err.write_text("")
        task = {
            "argv": [str(program), *map(str, arguments)],
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
    command = [sys.executable, str(_SERVER), *IMPORTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env)) as server:
        yield Forks(server, folder)
        assert server.stdin
        server.stdin.close()
