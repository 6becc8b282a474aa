"""Runs a job from where it is to its result."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from corpora import CORPORA
from pydantic import BaseModel, ConfigDict, ValidationError
from whole_file import write_whole

from sd_plugin.errors import UsageError

from . import results, supervision
from .job import Job, heading
from .results import Result
from .supervision import Program, Watch
from .systems import SYSTEMS

#: Seconds between two removals of files that are not needed any more.
_TIDY = 60.0


class RunError(Exception):
    """A step failed; the text is one line that says which and why."""


class Record(BaseModel):
    """``run.json`` in a job's folder: which training it is of, and what was done so far.

    Attributes:
        identity: what must be equal for the job to go on.
        facts: what ``facts.py`` said when it began.
        commands: by step, as first started; done: the steps that are.
        held: seconds in which it was paused; interrupted: how often it was started again.
    """

    model_config = ConfigDict(extra="forbid")

    identity: dict[str, Any]
    facts: dict[str, Any]
    commands: dict[str, str] = {}
    done: list[str] = []
    held: float = 0.0
    interrupted: int = 0


def folder_of(state: Path, row: str, seed: int, length: int) -> Path:
    """Where a job works, below the folder of the state."""
    return state / "runs" / row / f"seed{seed}-{length}"


def check(job: Job, data: Path) -> None:
    """See, before anything is started, that host and data are there.

    Raises:
        UsageError: one is not; the text names the command that gets it.
    """
    if problem := SYSTEMS[job.row.system].problem(job):
        raise UsageError(f"{job.row.name}: {problem}")
    corpus = CORPORA.get(job.row.data)
    names = [file.output for file in corpus.files] if corpus else [""]
    missing = next((name for name in names if not (data / job.row.data / name).exists()), None)
    if missing is not None:
        more = "" if corpus is None or corpus.fetchable else " --from PATH"
        raise UsageError(
            f"{job.row.name}: there is no {data / job.row.data / missing}: "
            f"python scripts/get_data.py {job.row.data}{more} --out {data}"
        )


def identity_of(job: Job, commit: str, dirty: bool) -> dict[str, Any]:
    """What makes a job the same one as another."""
    settings = {"device": job.device, "threads": job.threads, "stock": job.stock}
    return {
        "row": job.row.name, "seed": job.seed, "length": job.length, **settings, "commit": commit, "dirty": dirty
    }  # fmt: skip


@contextlib.contextmanager
def prepared(job: Job, data: Path, commit: str, dirty: bool, fresh: bool = False) -> Iterator[Record]:
    """Make the job's folder, or take it up again, and hold it against other processes.

    Args:
        fresh: throw away what is there.

    Raises:
        UsageError: it is of another training, or in use.
    """
    path, identity = job.folder / "run.json", identity_of(job, commit, dirty)
    job.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{job.folder} is in use by another run") from None
        if fresh:
            for old in job.folder.iterdir():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        if path.exists():
            record = _read(path)
            was = {key: record.identity.get(key) for key in identity}
            different = [
                f"{key} was {was[key]} and is {identity[key]}" for key in identity if was[key] != identity[key]
            ]
            if different:
                raise UsageError(f"{job.folder} is of another run: {', '.join(different)}; --fresh discards it")
            record.interrupted += 1
        else:
            record = Record(identity=identity, facts=_facts(job))
        link = job.folder / "data"
        link.unlink(missing_ok=True)
        link.symlink_to(data.resolve())
        _write(path, record)
        yield record
    finally:
        os.close(descriptor)


def _read(path: Path) -> Record:
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path} is damaged ({error.errors()[0]['msg']}); --fresh discards the run") from None


def _write(path: Path, record: Record) -> None:
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def _facts(job: Job) -> dict[str, Any]:
    command = [*job.script("reproduction/facts.py"), "cuda" if job.on_gpu else "cpu"]
    done = subprocess.run(command, env=job.environment(), capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"--device {job.device}: {_last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def run(job: Job, record: Record, idle: bool, watch: Watch) -> None:
    """Do all steps of a job that are not done yet.

    Args:
        record: of :func:`prepared`.
        idle, watch: as :func:`supervision.run`.

    Raises:
        RunError: a step failed.
    """
    system, path = SYSTEMS[job.row.system], job.folder / "run.json"
    for name in system.steps(job):
        if name in record.done:
            continue
        step = system.step(job, name)
        record.commands.setdefault(name, job.shown(step.command))
        _write(path, record)
        log = job.log(name)
        with log.open("a", encoding="utf-8") as file:
            file.write(heading(step, job.row.unit))
        environment = {**job.environment(), **step.variables}
        status = supervision.run(step.command, job.folder, environment, log, idle, _watching(job, record, watch))
        if status:
            told = _last_line(job.read_log(name))
            raise RunError(f"{job.row.name}: {name} ended with status {status} ({told}); see {log}")
        record.done.append(name)
        _write(path, record)


def _watching(job: Job, record: Record, watch: Watch) -> Watch:
    """``watch``, with what every run needs besides."""
    tidied = looked = time.monotonic()

    def look(program: Program) -> None:
        nonlocal tidied, looked
        now = time.monotonic()
        if program.held:
            record.held += now - looked
        elif now - tidied > _TIDY:
            SYSTEMS[job.row.system].tidy(job, finished=False)
            tidied = now
        looked = now
        watch(program)

    return look


def finish(job: Job, record: Record, target: Path, undisturbed: bool) -> Result:
    """Write the result of a job whose steps are all done, into its folder of ``target``.

    Raises:
        RunError: the host's files do not say what came out.
    """
    try:
        result = _result(job, record, undisturbed)
        results.save(result, SYSTEMS[job.row.system].curve(job), results.folder_of(target, job.row.name, job.seed))
    except (OSError, ValueError, KeyError, IndexError) as error:
        told = " ".join(str(error).split())
        raise RunError(f"{job.row.name}: no result in {job.folder} ({type(error).__name__}: {told})") from None
    SYSTEMS[job.row.system].tidy(job, finished=True)
    return result


def _result(job: Job, record: Record, undisturbed: bool) -> Result:
    """The result of a job whose steps are all done; some ValueError, KeyError or IndexError if it has none."""
    outcome, facts = SYSTEMS[job.row.system].outcome(job), record.facts
    versions = {name: version for name, version in facts["versions"].items() if version is not None}
    if job.row.system != "opennmt":
        versions.pop("OpenNMT-py", None)
    return Result(
        row=job.row.name,
        seed=job.seed,
        length=outcome.length,
        unit=job.row.unit,
        of=job.row.length,
        full=job.full,
        metrics=outcome.metrics,
        seconds=round(outcome.seconds, 3),
        undisturbed=undisturbed,
        skipped=outcome.skipped,
        hints_lost=outcome.hints_lost,
        precision=facts["precision"],
        backend=outcome.backend or facts["backend"],
        machine={**facts["machine"], "device": job.device, "threads": job.threads},
        versions={**versions, **outcome.versions},
        commit=record.identity["commit"],
        dirty=record.identity["dirty"],
        command=list(record.commands.values()),
        notes=[*job.row.notes, *outcome.notes, *_data_notes(job), *_interruptions(job, record)],
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _data_notes(job: Job) -> list[str]:
    """What is not the paper's about the corpus."""
    corpus = CORPORA.get(job.row.data)
    if corpus is None or not corpus.partial:
        return []
    manifest = job.folder / "data" / job.row.data / "manifest.json"
    try:
        unverified = json.loads(manifest.read_text(encoding="utf-8"))["recipe"]["unverified train"]
    except (OSError, ValueError, KeyError, TypeError):
        unverified = False
    return ["the training text is not verified" if unverified else f"partial data: {corpus.partial}"]


def _interruptions(job: Job, record: Record) -> list[str]:
    """What pauses and interruptions mean for the result."""
    notes = []
    if record.held >= 1.0:
        notes.append(f"paused for {record.held:,.0f} s, which are in the seconds")
    if record.interrupted and (repeated := SYSTEMS[job.row.system].repeated):
        times = "once" if record.interrupted == 1 else f"{record.interrupted} times"
        notes.append(f"interrupted {times}; repeated: {repeated}")
    return notes
