"""The settings of a language model's training: what a YAML file may say, read and checked."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from sd_plugin import UsageError
from sd_plugin.lstm import MODES


@dataclass(frozen=True)
class Settings:
    """One training; all values are plain, and each must be in the file.

    Attributes:
        data: folder of the text.
        mode: ``random``, ``nr_st`` or ``nr_rh_st``: what the dropouts are.
        hidden_size: units of the embedding and of each LSTM layer; num_layers: how many layers.
        dropout: probability that a unit is dropped, everywhere the same, in [0, 1).
        init_range: every parameter starts uniform in ±init_range.
        batch_size: columns of text that are read side by side; sequence_length: words of each that make a step.
        evaluation_batch_size: columns in which valid and test are read.
        epochs: length of the whole schedule.
        learning_rate: of SGD in the first epochs.
        learning_rate_decay: what it is divided by in each epoch after ``decay_after_epoch``.
        max_grad_norm: longer gradients are scaled down to this Euclidean norm.
        seed: of the first parameters and of all dropouts.
    """

    data: str
    mode: str
    hidden_size: int
    num_layers: int
    dropout: float
    init_range: float
    batch_size: int
    sequence_length: int
    evaluation_batch_size: int
    epochs: int
    learning_rate: float
    learning_rate_decay: float
    decay_after_epoch: int
    max_grad_norm: float
    seed: int

    def learning_rate_of(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 1."""
        return self.learning_rate / self.learning_rate_decay ** max(0, epoch - self.decay_after_epoch)


_TYPES: dict[str, type] = {field.name: field.type for field in fields(Settings)}  # type: ignore[misc]
_KINDS = {int: "a whole number", float: "a number", str: "text"}
#: Number -> what it may be, in words and as a test. What is not here must be positive.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "dropout": ("in [0, 1)", lambda value: 0 <= value < 1),
    "decay_after_epoch": ("at least 0", lambda value: value >= 0),
    "seed": ("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63),
}
_POSITIVE = ("positive and finite", lambda value: 0 < value < math.inf)


def read_settings(path: Path, changes: Mapping[str, Any]) -> Settings:
    """The settings of a YAML file.

    Args:
        changes: settings that replace the file's.

    Raises:
        UsageError: a key is unknown or missing, or a value is none that it may have. OSError: no such file.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings (key: value, a line each)")
    values.update(changes)
    if unknown := [str(key) for key in values if key not in _TYPES]:
        raise UsageError(f"{path}: unknown key {', '.join(unknown)}; valid: {', '.join(_TYPES)}")
    if missing := [key for key in _TYPES if key not in values]:
        raise UsageError(f"{path}: missing key {', '.join(missing)}")
    return Settings(**{key: _checked(key, values[key]) for key in _TYPES})


def parse_changes(texts: list[str]) -> dict[str, Any]:
    """Settings given as ``key=value`` on a command line; values are read as YAML.

    Raises:
        UsageError: one has another form.
    """
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            changes[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UsageError(f"--set {text}: must be key=value")
    return changes


def _checked(key: str, value: Any) -> Any:
    """``value`` in the type of setting ``key``; UsageError if it is none or out of range."""
    kind = _TYPES[key]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # Text too: YAML takes 1e-3 for text, as it wants 1.0e-3.
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{key} must be {_KINDS[kind]}, got {value!r}")
    if key == "mode" and value not in MODES:
        raise UsageError(f"unknown mode {value!r}; choose one of {', '.join(MODES)}")
    if kind is not str:
        words, is_valid = _RANGES.get(key, _POSITIVE)
        if not is_valid(value):
            raise UsageError(f"{key} must be {words}, got {value}")
    return value
