"""Where runs take scripts, configurations and the library from: this checkout, or a commit of it by itself."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from whole_file import write_whole

from sd_plugin.errors import UsageError

#: What the programs of all rows need, of pyproject.toml's extras.
_EXTRAS = "opennmt-unpinned,demo,ner,reproduce"
#: What runs take from a checkout. A new result in it, for one, is no change of what comes after.
_TAKEN = ("sd_plugin", "kernels", "patches", "scripts", "configs", "setup.py", "pyproject.toml")
_OPENNMT = "OpenNMT-py==3.5.1"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """Scripts with an interpreter that has this library installed.

    Attributes:
        source: the root of scripts and configurations.
        python: the interpreter.
        commit: 40 digits, or ``unknown``; dirty: whether what runs take from ``source`` has changes besides.
    """

    source: Path
    python: Path
    commit: str
    dirty: bool


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def here(root: Path) -> Environment:
    """This checkout and interpreter as they are."""
    head, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *_TAKEN)
    commit = head.decode().strip() if head else "unknown"
    # Not resolved: a virtual environment's interpreter is a link to one that knows nothing of it.
    return Environment(root, Path(sys.executable), commit, bool(changes))


def commit_named(root: Path, name: str) -> str:
    """The 40 digits of a commit.

    Raises:
        UsageError: there is no such commit here.
    """
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found is None:
        raise UsageError(f"--commit {name}: {root} has no such commit; a queue runs from a clone, or with --here")
    return found.decode().strip()


def at_commit(root: Path, commit: str, folder: Path, say: Say) -> Environment:
    """A commit exported, built as a wheel and installed in a virtual environment; made unless it is there.

    Args:
        commit: 40 digits.
        folder: of the environments; this one gets a folder of its own in it.

    Raises:
        UsageError: it cannot be made; the text names the log.
    """
    own = folder / commit[:12]
    found = Environment(own / "source", own / "venv" / "bin" / "python", commit, False)
    ready = own / "ready.json"
    if ready.exists():
        return found
    shutil.rmtree(own, ignore_errors=True)
    found.source.mkdir(parents=True)
    say(f"making {own}, once for this commit: takes minutes, and gigabytes with a torch for GPUs")
    _export(root, commit, found.source)
    _install(found, own, say)
    write_whole(ready, json.dumps({"commit": commit}) + "\n")
    return found


def _export(root: Path, commit: str, target: Path) -> None:
    content = _git(root, "archive", "--format=tar", commit)
    if content is None:
        raise UsageError(f"git cannot export commit {commit[:12]} of {root}")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        # Our own files; Pythons before 3.12 may not know the argument `filter`.
        archive.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    if not (target / "scripts" / "reproduce.py").is_file():
        raise UsageError(f"commit {commit[:12]} has no scripts/reproduce.py: name a later one with --commit")


def _install(environment: Environment, own: Path, say: Say) -> None:
    """As the Makefile does it, but the library as a wheel."""
    log, wheels = own / "install.log", own / "wheels"
    pip = [str(environment.python), "-m", "pip"]
    pinned = ["-c", str(environment.source / "constraints.txt")]
    _run([sys.executable, "-m", "venv", str(own / "venv")], log)
    say("  torch")
    _run([*pip, "install", *pinned, "torch"], log)
    say("  OpenNMT-py, without its pin of an old torch")
    _run([*pip, "install", "--no-deps", _OPENNMT], log)
    say("  sd-plugin and what the programs need")
    _run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(environment.source)], log)
    (wheel,) = wheels.glob("*.whl")
    _run([*pip, "install", "--use-pep517", *pinned, f"{wheel}[{_EXTRAS}]"], log)


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if status:
        errors = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        raise UsageError(f"cannot install ({errors[-1].strip() if errors else f'status {status}'}); see {log}")
