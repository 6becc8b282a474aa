"""What a run leaves in its folder ``ROW/seedN``, ``result.json`` and ``curve.csv``: written, read, checked."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from whole_file import write_whole

from sd_plugin.errors import UsageError

#: Grows when the meaning of the files changes.
SCHEMA = 1
RESULT, CURVE = "result.json", "curve.csv"


class Result(BaseModel):
    """``result.json``: what was trained, how, and what came out.

    Attributes:
        kind, schema_version: tell the file from others; in the file the latter is ``schema``.
        row, seed, unit: as in the table of rows and on the command line.
        length: how long was trained, in ``unit``; of: the length of the whole training.
        full: whether the training ended as the whole one does; all else is a shortened run.
        metrics: what came out, by metric, after the last epoch or step, or of the model that the host picks.
        seconds: of training, as the host measures them.
        undisturbed: whether the run had the machine's priority; if not, ``seconds`` says nothing of speed.
        skipped: share of the multiply-adds left out, in [0, 1]; None where the host has nothing to skip with.
        hints_lost: dropped tensors that reached no product that skips; None where there is none or it is unknown.
        precision: as ``sd-plugin bench`` names them.
        backend: that of the products: ``stock`` for the host's own modules.
        machine, versions: where and with what.
        commit: of this project, 40 digits; dirty: whether the checkout had changes besides.
        command: the command lines, from the root of a clone.
        notes: what a reader must know: partial data, random vectors, what was repeated after an interruption.
        date: of the end, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    kind: Literal["sd-plugin reproduction"] = "sd-plugin reproduction"
    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    row: str
    seed: int = Field(ge=0)
    length: int = Field(gt=0)
    unit: Literal["epochs", "steps"]
    of: int = Field(gt=0)
    full: bool
    metrics: dict[str, float] = Field(min_length=1)
    seconds: float = Field(ge=0)
    undisturbed: bool
    skipped: float | None = Field(ge=0, le=1)
    hints_lost: int | None = Field(ge=0)
    precision: str
    backend: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: str = Field(pattern=r"^[0-9a-f]{40}$|^unknown$")
    dirty: bool
    command: list[str] = Field(min_length=1)
    notes: list[str]
    date: str

    @model_validator(mode="after")
    def _shortened_runs_say_so(self) -> Result:
        if self.full and self.length > self.of:
            raise ValueError(f"full, but {self.length} of {self.of} {self.unit}")
        return self

    @property
    def label(self) -> str:
        """Its length in words, which says whether it is shortened."""
        length = f"{self.length:,} of {self.of:,} {self.unit}"
        if not self.full:
            return f"shortened: {length}"
        # A host may stop early by a rule of its own.
        return f"{self.length:,} {self.unit}" if self.length == self.of else f"{length}, stopped by the host"


#: A line of ``curve.csv``: ``epoch`` or ``step`` first, then ``seconds`` and metrics. None where nothing was measured.
Point = dict[str, "float | None"]


@dataclass(frozen=True)
class Saved:
    """A result with its curve and the folder that both are in."""

    result: Result
    curve: list[Point]
    folder: Path

    def seconds_per_unit(self) -> float | None:
        """The median over the curve: a pause or a busy hour does not show in it."""
        return seconds_per_unit(self.curve, self.result.unit)


def seconds_per_unit(curve: Sequence[Point], unit: str) -> float | None:
    """Seconds of an epoch or step: the median over a curve, None if it has none."""
    key, before, found = unit[:-1], 0.0, []
    for point in curve:
        at, seconds = point[key], point.get("seconds")
        if at is not None and seconds is not None and at > before:
            found.append(seconds / (at - before))
        before = at or before
    return sorted(found)[len(found) // 2] if found else None


def folder_of(results: Path, row: str, seed: int) -> Path:
    """Where the result of a run belongs."""
    return results / row / f"seed{seed}"


def save(result: Result, curve: Sequence[Point], folder: Path) -> None:
    """Write both files, each whole or not at all, ``result.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = list(dict.fromkeys(name for point in curve for name in point))
    writer.writerow(names)
    lines = [[point.get(name) for name in names] for point in curve]
    writer.writerows(["" if value is None else _plain(value) for value in line] for line in lines)
    write_whole(folder / CURVE, text.getvalue())
    write_whole(folder / RESULT, result.model_dump_json(by_alias=True, indent=1) + "\n")


def _plain(value: float) -> str:
    # A run that has diverged has curves with inf and nan.
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)


def load(folder: Path) -> Saved:
    """Read a folder of :func:`save`.

    Raises:
        UsageError: a file is missing, of another schema, or contradicts itself or its folder.
    """
    path = folder / RESULT
    try:
        result = Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path} is not of schema {SCHEMA} of reproduce.py: {where}: {first['msg']}") from None
    if folder.parts[-len(Path(result.row).parts) - 1 :] != (*Path(result.row).parts, f"seed{result.seed}"):
        raise UsageError(f"{path} is of row {result.row}, seed {result.seed}, and lies in another folder")
    return Saved(result, _read_curve(folder / CURVE, result.unit), folder)


def _read_curve(path: Path, unit: str) -> list[Point]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        curve = [{name: float(text) if text else None for name, text in line.items()} for line in lines]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(f"{path} is no curve: {error}") from None
    at = [point.get(unit[:-1]) for point in curve]
    known = [value for value in at if value is not None and math.isfinite(value)]
    if not known or len(known) < len(at) or any(a >= b for a, b in pairwise(known)):
        raise UsageError(f"{path} is no curve: its column {unit[:-1]} must be there and ascend")
    return curve


def scan(results: Path) -> Iterator[Saved]:
    """Every result below a folder, in the order of their names; errors as :func:`load`."""
    # The result is written last: a folder without one is being written, or its run was killed as it wrote.
    for path in sorted(results.rglob(f"seed*/{RESULT}")):
        yield load(path.parent)


def check_free(results: Path, row: str, seed: int, length: int, force: bool) -> None:
    """See, before hours are spent, that a run's result may take its place.

    Raises:
        UsageError: there is one as long or longer, and ``force`` is not given; or something else is there.
    """
    folder = folder_of(results, row, seed)
    if force or not (folder / RESULT).exists():
        return
    there = load(folder).result
    if there.length >= length or there.full:
        raise UsageError(f"{folder} holds a result already ({there.label}); --force replaces it")
