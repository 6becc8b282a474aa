"""The settings of a language model's training: what a YAML file may say, read and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from plain_yaml import parse_yaml, read_yaml
from pydantic import AfterValidator, BaseModel, Field, model_validator
from user_input import STRICT, Number, Text, WholeNumber, shortened, shown, validated

from sd_plugin import UsageError

#: Largest float32, which all parameters are, and what is multiplied with them must be.
FLOAT32_MAX = 3.4028234e38


def _path(text: str) -> str:
    """``text``, if it can be a path."""
    if "\0" in text or len(text.encode()) > 4095:
        raise UsageError(f"data must be the path of a folder, got {shown(text)}")
    return text


Count = Annotated[WholeNumber, Field(ge=1)]
Positive = Annotated[Number, Field(gt=0)]


class Settings(BaseModel):
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

    model_config = STRICT

    data: Annotated[Text, AfterValidator(_path)]
    mode: Literal["random", "nr_st", "nr_rh_st"]
    hidden_size: Count
    num_layers: Count
    dropout: Annotated[Number, Field(ge=0, lt=1)]
    # The width of the range, too, must be a float32.
    init_range: Annotated[Positive, Field(le=FLOAT32_MAX / 2)]
    batch_size: Count
    sequence_length: Count
    evaluation_batch_size: Count
    epochs: Count
    learning_rate: Annotated[Positive, Field(le=FLOAT32_MAX)]
    learning_rate_decay: Positive
    decay_after_epoch: Annotated[WholeNumber, Field(ge=0)]
    max_grad_norm: Positive
    seed: Annotated[WholeNumber, Field(ge=0)]

    def learning_rate_of(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 1."""
        return self.learning_rate / self.learning_rate_decay ** max(0, epoch - self.decay_after_epoch)

    @model_validator(mode="after")
    def _schedule_stays_in_range(self) -> "Settings":
        """The last learning rate is the farthest from the first."""
        try:
            last = self.learning_rate_of(self.epochs)
        except ArithmeticError:
            last = 0.0
        if not 0 < last <= FLOAT32_MAX:
            raise UsageError(
                f"learning_rate_decay {self.learning_rate_decay:g} takes the learning rate out of the range of numbers "
                f"before epoch {self.epochs}, the last: it must be nearer to 1, or epochs fewer"
            )
        return self


def read_settings(path: Path, changes: Mapping[str, Any]) -> Settings:
    """The settings of a YAML file.

    Args:
        changes: settings that replace the file's.

    Raises:
        UsageError: a key is unknown or missing, or a value is none that it may have. OSError: no such file.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UsageError(f"{shortened(str(path))} holds no settings (key: value, a line each)")
    source = shortened(str(path)) if changes.keys() <= Settings.model_fields.keys() else "--set"
    return validated(Settings, {**values, **changes}, f"{source}: ")


def parse_changes(texts: list[str]) -> dict[str, Any]:
    """Settings given as ``key=value`` on a command line; values are read as YAML.

    Raises:
        UsageError: one has another form.
    """
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {shortened(text, 100)}: must be key=value")
        try:
            changes[key.strip()] = parse_yaml(value)
        except UsageError as error:
            raise UsageError(f"--set {shortened(key, 100)}: its value is not YAML: {error}") from None
    return changes
