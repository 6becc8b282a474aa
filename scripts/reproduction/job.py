"""One run of a row, and what a system has to say about it."""

from __future__ import annotations

import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sd_plugin.errors import UsageError
from sd_plugin.patches._checkout import Checkout

from .results import Point
from .rows import Row

#: Variables of the user's that would change what is trained, or by how many threads.
_DROPPED = (
    *("SD_PLUGIN", "SD_PLUGIN_TARGETS", "SD_PLUGIN_CASE", "SD_PLUGIN_RECURRENT_DROPOUT", "SD_PLUGIN_REPORT"),
    "MKL_NUM_THREADS",
)


@dataclass(frozen=True)
class Job:
    """A training to be made.

    Attributes:
        row, seed, length: what, and how long in the row's unit.
        device: ``cpu``, ``cuda`` or ``cuda:N``; threads: of the CPU.
        stock: run the baseline on the host's own modules even where this library's dense kernels would do.
        folder: working directory of every command; ``data`` in it leads to the corpora.
        source: the root of scripts and configurations; python: the interpreter of all commands.
    """

    row: Row
    seed: int
    length: int
    device: str
    threads: int
    stock: bool
    folder: Path
    source: Path
    python: Path

    @property
    def full(self) -> bool:
        """Whether it is the whole training."""
        return self.length == self.row.length

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def script(self, name: str) -> list[str]:
        """The beginning of a command that runs a file of ``scripts/``."""
        return [str(self.python), str(self.source / "scripts" / name)]

    def program(self, name: str) -> str:
        """A program that was installed beside the interpreter."""
        return str(self.python.with_name(name))

    def log(self, step: str) -> Path:
        """The output of a step, of all its attempts."""
        return self.folder / f"{step}.log"

    def read_log(self, step: str) -> str:
        """The text of :meth:`log`, empty if there is none yet."""
        path = self.log(step)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def environment(self) -> dict[str, str]:
        """The variables of every command."""
        kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
        if self.device.startswith("cuda:"):
            kept["CUDA_VISIBLE_DEVICES"] = self.device.partition(":")[2]
        return {**kept, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}

    def shown(self, command: list[str]) -> str:
        """A command as a user would type it in a clone, without folders of this machine."""
        names = {str(self.python): "python", self.program("onmt_train"): "onmt_train"}
        names |= {self.program(name): name for name in ("onmt_build_vocab", "onmt_translate", "sacrebleu")}
        return " ".join(names.get(word, word.replace(f"{self.source}/", "")) for word in command)


@dataclass(frozen=True)
class Step:
    """A command of a run.

    Attributes:
        command: the program and its arguments.
        since: epochs or steps that are done already, from which it goes on.
        variables: of its environment, beside those of all.
    """

    command: list[str]
    since: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came out of a run; attributes as in :class:`.results.Result`."""

    length: int
    metrics: dict[str, float]
    seconds: float
    skipped: float | None
    hints_lost: int | None
    backend: str | None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)


class System(ABC):
    """How rows of one host are run, and what their files say.

    Attributes:
        repeated: what is done again after an interruption, for whoever reads the result; empty if nothing is.
    """

    repeated = ""

    def problem(self, job: Job) -> str | None:
        """Why the row cannot run here, with the command that helps; None if it can."""
        return None

    @abstractmethod
    def steps(self, job: Job) -> list[str]:
        """The names of the steps, in order; ``train`` is one of them."""

    @abstractmethod
    def step(self, job: Job, name: str) -> Step:
        """A step, going on where the files in the folder say that it stopped."""

    @abstractmethod
    def curve(self, job: Job) -> list[Point]:
        """What the files say so far."""

    @abstractmethod
    def outcome(self, job: Job) -> Outcome:
        """What the files say when all steps are done; ValueError if they do not."""

    def progress(self, job: Job) -> tuple[int, str]:
        """Epochs or steps done, and the last metric in words."""
        for point in reversed(self.curve(job)):
            told = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in point.items() if _tells(name, value)]
            return int(point[job.row.unit[:-1]] or 0), ", ".join(told)
        return 0, ""

    def tidy(self, job: Job, finished: bool) -> None:  # noqa: B027 - most have nothing to remove
        """Remove large files that neither the rest of the run nor its result needs; called now and then."""


def _tells(name: str, value: float | None) -> bool:
    return value is not None and name.startswith(("valid_", "test_"))


#: The line that begins a process's output in a log.
_HEADING = re.compile(r"^# reproduce\.py: started after (\d+) [a-z]+$", re.MULTILINE)


def heading(step: Step, unit: str) -> str:
    """What is written into a log before a process's output; :func:`attempts` reads it."""
    return f"\n# reproduce.py: started after {step.since} {unit}\n"


def attempts(text: str) -> list[tuple[int, str]]:
    """The processes whose output is in a log: where each began, and what it wrote."""
    pieces = _HEADING.split(text)
    return [(int(since), written) for since, written in zip(pieces[1::2], pieces[2::2], strict=True)]


@dataclass(frozen=True)
class Report:
    """The last report of dropped and skipped units in a text."""

    backend: str
    skipped: float | None
    hints_lost: int


def report(text: str) -> Report | None:
    """Read a report of :mod:`sd_plugin.stats`; None if the text has none."""
    found = list(re.finditer(r"sd-plugin: structured dropout report \(backend: ([^)]*)\)", text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    share = re.search(r"multiply-adds of these products skipped \(([\d.]+)%\)", rest)
    lost = re.findall(r"^ +\S+ +\d+ +[\d.]+% +(?:[\d.]+%|-) +\d+ +(\d+)$", rest, re.MULTILINE)
    return Report(found[-1][1], round(float(share[1]) / 100, 6) if share else None, sum(map(int, lost)))


def is_whole(path: Path) -> bool:
    """Whether a file of ``torch.save`` is there with all its bytes: a host may have been killed as it wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def locate(checkout: Checkout) -> Path:
    """The folder of a host's checkout that is here already.

    Raises:
        UsageError: there is none, or it is not that host's; the text says how to get it.
    """
    found = checkout.candidates(os.environ)
    if not found:
        raise UsageError(
            f"no checkout of {checkout.name}: git clone {checkout.origin} DIR && "
            f"git -C DIR checkout {checkout.commit[:10]}, and name it by {checkout.variable}=DIR"
        )
    if problem := checkout.problem(found[0]):
        raise UsageError(problem)
    return found[0].resolve()
