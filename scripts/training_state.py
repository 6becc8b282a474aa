"""The folder of a training: its checkpoint, its log and its result, whole at any moment.

A file is written under another name, flushed to the disk and renamed, so that whatever ends a run, the power too,
leaves the old file or the new one. The checkpoint is the truth: it holds the rows of the log, and the log is written
after it and again on resuming, so that the two agree.
"""

import contextlib
import csv
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import run_folder
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from user_input import in_one_line, shortened, shown
from whole_file import write_whole

from sd_plugin import UsageError

#: Grows when the meaning of a checkpoint changes.
FORMAT = 1
#: What a checkpoint holds: ``identity`` says which training it is of; only tensors and plain values are anywhere in it.
KEYS = ("format", "identity", "epoch", "model", "optimizer", "random", "log")

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Row(BaseModel):
    """One epoch in the log."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    mode: str
    seed: int
    epoch: int
    epochs: int
    learning_rate: Finite
    train_perplexity: Finite
    valid_perplexity: Finite
    seconds: Finite
    words_per_second: Finite
    skipped: Finite


class Checkpoint(BaseModel):
    """What is in a checkpoint, as far as that can be said without the training that it is of."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    identity: dict[str, str | int | float]
    epoch: Annotated[int, Field(ge=1)]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: list[dict[str, Tensor]]
    log: list[Row]

    @model_validator(mode="after")
    def _log_is_of_all_epochs(self) -> "Checkpoint":
        if [row.epoch for row in self.log] != list(range(1, self.epoch + 1)):
            raise ValueError(f"its log is not that of {self.epoch} epochs")
        return self


class RunFolder:
    """The files of one training in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.log = path / "log.csv"
        self.result = path / "result.json"
        self.files = (self.checkpoint, self.log, self.result)

    def check(self, resume: bool) -> None:
        """See that what is there may be continued, if ``resume``, or that nothing is there to be overwritten.

        Raises:
            UsageError: naming what else can be done.
        """
        if resume and not self.checkpoint.exists():
            raise UsageError(f"{self.path} has no {self.checkpoint.name} to resume: leave out --resume to start one")
        if not resume and self.checkpoint.exists():
            raise UsageError(f"{self.checkpoint} is there: give --resume to continue it, or another folder with --out")
        for file in (self.log, self.result):
            if not resume and file.exists():
                raise UsageError(f"{file} is there without its checkpoint: move it away, or give another --out")

    @contextlib.contextmanager
    def held(self, resume: bool, writes: bool) -> Iterator[None]:
        """:meth:`check` the folder, and hold it against other runs; if it is missing, make it. If killed, the system
        lets go.

        Args:
            writes: of several processes only the one that writes holds it; the others check.

        Raises:
            UsageError: as :meth:`check`, or another run holds it. OSError: it cannot be made or written.
        """
        self.check(resume)
        if not writes:
            yield
            return
        with run_folder.held(self.path):
            # Whoever held it before may have left something.
            self.check(resume)
            yield

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, then the log.

        Args:
            state: :data:`KEYS` without ``format``.

        Raises:
            OSError: a file cannot be written; the old one is still there.
        """
        content = io.BytesIO()
        torch.save({"format": FORMAT, **state}, content)
        write_whole(self.checkpoint, content.getbuffer())
        run_folder.has_result(self.path)
        self.write_log(state["log"])

    def write_log(self, rows: list[dict[str, Any]]) -> None:
        """Replace the log by these rows, of which there must be one."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.log, text.getvalue())

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replace the result by these plain values."""
        write_whole(self.result, json.dumps(result, indent=2) + "\n")

    def load(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint, on the CPU.

        Args:
            identity: of the training that is to go on.

        Raises:
            UsageError: it is damaged, no checkpoint of ours, or of another training. OSError: it cannot be read.
        """
        state = _read(self.checkpoint)
        is_ours = isinstance(state, dict) and all(key in state for key in KEYS)
        if not is_ours or not isinstance(state["format"], int) or state["format"] != FORMAT:
            raise UsageError(f"{self.checkpoint} is no checkpoint of this program; it was left as it is")
        try:
            Checkpoint.model_validate(state)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "".join(f"{part}: " for part in first["loc"])
            raise self.broken(place + first["msg"].removeprefix("Value error, ")) from None
        if differing := _differences(state["identity"], identity):
            raise UsageError(
                f"{self.checkpoint} is of another training: {differing}; "
                "run it with the same settings, or give another folder with --out"
            )
        return state

    def broken(self, reason: str) -> UsageError:
        """The error to raise if a checkpoint, whole as it is, does not hold what it must."""
        return UsageError(
            f"{self.checkpoint} is broken ({in_one_line(reason, 200)}); "
            "it was left as it is: move it away, or put a good copy there"
        )


def fault_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What is wrong with tensors that ought to be like others by name, shape and dtype, and finite; None if nothing."""
    if missing := [name for name in expected if name not in found]:
        return f"{missing[0]} is missing"
    for name, tensor in found.items():
        if name not in expected:
            return f"{shown(name)} is unknown"
        kind, wanted = _kind(tensor), _kind(expected[name])
        if kind != wanted:
            return f"{name} is {kind}, and must be {wanted}"
        if not tensor.isfinite().all():
            return f"{name} holds values that are not finite"
    return None


def _kind(tensor: Tensor) -> str:
    """Dtype and shape; and how it is stored, if not as all of ours are."""
    is_ordinary = tensor.layout == torch.strided and not tensor.is_meta
    stored = "" if is_ordinary else f" ({tensor.layout}, {tensor.device})"
    return f"{tensor.dtype}{list(tensor.shape)}{stored}".removeprefix("torch.")


def _read(path: Path) -> Any:
    """What ``torch.save`` wrote, if its bytes are as they were written."""
    content = io.BytesIO(path.read_bytes())
    try:
        # torch writes checksums, but does not look at them.
        with zipfile.ZipFile(content) as archive:
            damaged = archive.testzip()
        if damaged is None:
            content.seek(0)
            return torch.load(content, map_location="cpu", weights_only=True)
        reason = f"{damaged} has another checksum"
    except Exception as error:  # whatever a reader makes of broken bytes
        reason = shortened(str(error).partition(". ")[0].partition("\n")[0], 200) or type(error).__name__
    raise UsageError(f"{path} is damaged ({reason}); it was left as it is: move it away, or put a good copy there")


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys in which two identities differ, with both values."""
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return ", ".join(f"{shortened(key, 60)} was {_told(was.get(key))} and is {_told(now.get(key))}" for key in keys)


def _told(value: object) -> str:
    return shortened(str(value), 60)
