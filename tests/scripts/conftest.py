"""What the tests of the scripts share: the scripts as modules and programs, and a server on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ..forks import Forks
from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

# As Python itself does for a script: the folder of the script is where its siblings are imported from.
sys.path.insert(0, str(ROOT / "scripts"))


@dataclass
class Program:
    """``get_data.py`` with a folder of its own for the corpora."""

    out: Path
    fork: Forks

    def command(self, *arguments: object) -> list[str]:
        script = ROOT / "scripts" / "get_data.py"
        return [sys.executable, str(script), *map(str, arguments), "--out", str(self.out)]

    def __call__(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        if not options:
            return self.fork(Path(command[1]), command[2:], cwd=Path.cwd(), env=os.environ)
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)

    def fails(self, *arguments: object, status: int = 1, **options: object) -> str:
        """Run it, see that it fails in one line on standard error, and return that line."""
        done = self(*arguments, **options)
        assert done.returncode == status, done.stderr
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        return line

    def left(self) -> list[str]:
        """Everything in the folder of the corpora, hidden or not."""
        return sorted(path.name for path in self.out.iterdir()) if self.out.is_dir() else []

    def contents(self) -> dict[str, bytes]:
        """Every file below the folder of the corpora, with its bytes."""
        return {str(path): path.read_bytes() for path in self.out.rglob("*") if path.is_file()}


@pytest.fixture
def get_data(tmp_path: Path, fork: Forks) -> Program:
    return Program(tmp_path / "data", fork)


@pytest.fixture
def archive_of() -> Callable[[str], Path]:
    """Where the real text of a corpus lies; skips the test where it does not."""

    def find(name: str) -> Path:
        folder = os.environ.get("SD_PLUGIN_TEST_DATA") or ROOT.parent / "shared" / "data"
        archive = Path(folder) / f"{name}.tar.xz"
        if not archive.is_file():
            pytest.skip(f"set SD_PLUGIN_TEST_DATA to a folder with {name}.tar.xz: the text may not be shipped")
        return archive

    return find


@dataclass
class Server:
    """Serves files from memory; knows the tricks that networks play.

    Attributes:
        files: contents by name.
        cuts: after how many bytes each of the next answers breaks off.
        ranges: whether it can send the rest of a file.
        pause: seconds between two pieces of ``piece`` bytes.
        asked: "name" or "name from N" of every request.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    pause: float = 0.0
    piece: int = 1 << 16
    asked: list[str] = field(default_factory=list)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[1]
            if name not in server.files:
                self.send_error(404)
                return
            content, start = server.files[name], 0
            if server.ranges and (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
                start = int(wanted[1])
            server.asked.append(f"{name} from {start}" if start else name)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = start + server.cuts.pop(0) if server.cuts else len(content)
            for at in range(start, min(end, len(content)), server.piece):
                time.sleep(server.pause)
                try:
                    self.wfile.write(content[at : min(at + server.piece, end)])
                except ConnectionError:  # the client was killed
                    return

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server("")
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    listener.shutdown()
    thread.join()
    listener.server_close()
