"""How the programs read what a user gives: through a schema, with one line that says what is wrong.

A schema is a pydantic model. The type and the bounds of a value are said once, in its field, and what a message says of
valid values is made from them.

    class Settings(BaseModel):
        model_config = STRICT
        layers: Annotated[WholeNumber, Field(ge=1)]

    validated(Settings, {"layers": 0})  # UsageError: layers must be a whole number from 1 to 2**63 - 1, got 0
"""

import argparse
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import annotated_types
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from typer_program import in_one_line, shortened

from sd_plugin.errors import UsageError

#: Longest value that a message shows whole.
VALUE_LENGTH = 60
#: Largest number that torch takes where it wants a whole one.
INT64_MAX = 2**63 - 1

Model = TypeVar("Model", bound=BaseModel)


# ------------------------------------------------------------------------------------------------ values in words


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxdict = self.maxtuple = self.maxset = self.maxfrozenset = 3
        self.maxstring = self.maxother = VALUE_LENGTH

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to write the digits of a very long one.
        return repr(x) if x.bit_length() < 128 else f"a number of about {x.bit_length() * 0.30103:,.0f} digits"


def shown(value: object) -> str:
    """Any value as Python writes it, short enough for a message."""
    return shortened(_Short().repr(value), VALUE_LENGTH)


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line: of an OSError its file and the system's words."""
    if isinstance(error, OSError) and error.strerror:
        return shortened(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return in_one_line(str(error)) or type(error).__name__


# ------------------------------------------------------------------------------------------------------- schemas


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError
    return value


def _whole_from_text(value: object) -> object:
    return int(value) if isinstance(value, str) else _whole(value)


def _number(value: object) -> object:
    # Text too: YAML takes 1e-3 for text, as it wants 1.0e-3; and a command line has nothing else.
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError
    try:
        return float(value)
    except OverflowError:
        raise ValueError from None


#: A whole number, which text is not; and one of a command line, where all is text.
WholeNumber = Annotated[int, Strict(), BeforeValidator(_whole), Field(ge=-INT64_MAX, le=INT64_MAX)]
WholeNumberText = Annotated[int, Strict(), BeforeValidator(_whole_from_text), Field(ge=-INT64_MAX, le=INT64_MAX)]
#: A finite number; negative zero is zero.
Number = Annotated[
    float, BeforeValidator(_number), Field(allow_inf_nan=False), AfterValidator(lambda value: value + 0.0)
]
Text = Annotated[str, Strict()]

#: Of a schema that says all there may be.
STRICT = ConfigDict(extra="forbid", frozen=True)

_KINDS = {int: "a whole number", float: "a finite number", str: "text"}


def validated(model: type[Model], values: Mapping[Any, Any], where: str = "") -> Model:
    """``values`` as a ``model``.

    Args:
        where: put before a message about keys, as ``file: ``.

    Raises:
        UsageError: the first thing that is wrong: an unknown or missing key, or a value that is not valid.
    """
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    unknown = [key for key in values if not isinstance(key, str) or key not in fields]
    if unknown and model.model_config.get("extra") == "forbid":
        told = ", ".join(key if isinstance(key, str) and key.isidentifier() else shown(key) for key in unknown)
        raise UsageError(f"{where}unknown key {shortened(told, 100)}; valid: {', '.join(fields)}")
    if missing := [name for name, field in fields.items() if field.is_required() and name not in values]:
        raise UsageError(f"{where}missing key {', '.join(missing)}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, UsageError):
        raise own from None
    name = str(first["loc"][0])
    raise UsageError(f"{name} must be {_valid(fields[name])}, got {shown(values[name])}") from None


def _valid(field: Any) -> str:
    """What the value of a field may be, in words."""
    annotation, metadata = field.annotation, list(field.metadata)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        # That it may be left out is not worth a word.
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    if typing.get_origin(annotation) is Annotated:
        annotation, *inner = typing.get_args(annotation)
        metadata = [*inner, *metadata]
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(annotation)))}"
    return f"{_KINDS[annotation]}{_bounds(metadata)}"


def _bounds(metadata: list[Any]) -> str:
    """The bounds among the constraints of a field, of which the last ones hold."""
    at_least = above = at_most = below = None
    for item in (part for whole in metadata for part in getattr(whole, "metadata", [whole])):
        if isinstance(item, annotated_types.Ge):
            at_least, above = item.ge, None
        elif isinstance(item, annotated_types.Gt):
            at_least, above = None, item.gt
        elif isinstance(item, annotated_types.Le):
            at_most, below = item.le, None
        elif isinstance(item, annotated_types.Lt):
            at_most, below = None, item.lt
    if at_least is not None and at_most is not None:
        return f" from {_figure(at_least)} to {_figure(at_most)}"
    words = {"of at least": at_least, "above": above, "of at most": at_most, "below": below}
    told = [f"{word} {_figure(bound)}" for word, bound in words.items() if bound is not None]
    return f" {' and '.join(told)}" if told else ""


def _figure(value: Any) -> str:
    """A bound; those of machine numbers are told as powers of two."""
    for name, bound in (("2**63 - 1", INT64_MAX), ("2**32 - 1", 2**32 - 1)):
        if abs(value) == bound:
            return name if value > 0 else f"-({name})"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------- command lines


class Parser(argparse.ArgumentParser):
    """An argparse parser that tells what is wrong as UsageError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(in_one_line(message, 300))
