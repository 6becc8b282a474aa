"""The ``sd_*`` options of an OpenNMT-py configuration: their defaults, their checks, and what they come to.

They are model options: OpenNMT-py saves them in every checkpoint and reads them back to resume or to translate.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import UsageError
from ..lstm import MODES, check_mode
from ..patterns import SAMPLINGS, check_probability, check_sampling

#: Raised when the meaning of a stored option changes, so that an older plugin refuses instead of guessing.
FORMAT = 1
#: Encoder and decoder types that are always ours.
OWN_TYPES = ("sd_rnn", "sd_brnn")
#: Stock types that are ours when replacement is switched on.
REPLACED_TYPES = ("rnn", "brnn", "ifrnn")

OPTIONS: dict[str, dict[str, Any]] = {
    "sd_mode": {
        "type": str,
        "help": f"Structured dropout: one of {', '.join(MODES)}. Default: nr_rh_st, or what SD_PLUGIN names.",
    },
    "sd_recurrent_dropout": {
        "type": float,
        "help": "Dropout of the recurrent state. Default: as dropout in nr_rh_st (its schedule too), else none.",
    },
    "sd_output_dropout": {
        "type": float,
        "help": "Dropout of the encoder's and the decoder's LSTM output. Default: as dropout in nr_rh_st, else none.",
    },
    "sd_sampling": {
        "type": str,
        "help": f"How kept units are drawn: one of {', '.join(SAMPLINGS)}. Default: exact.",
    },
}


@dataclass(frozen=True)
class Settings:
    """What the options of one model come to.

    Attributes:
        mode, sampling: as :class:`~sd_plugin.StructuredDropoutLSTM`.
        recurrent, output: fixed probabilities; None follows ``dropout`` through its schedule.
    """

    mode: str
    sampling: str = "exact"
    recurrent: float | None = None
    output: float | None = None

    def recurrent_dropout(self, dropout: float) -> float:
        """Probability for the recurrent state while the model's dropout is ``dropout``."""
        return self._follow(self.recurrent, dropout)

    def output_dropout(self, dropout: float) -> float:
        """Probability for the LSTM outputs while the model's dropout is ``dropout``."""
        return self._follow(self.output, dropout)

    def _follow(self, fixed: float | None, dropout: float) -> float:
        if fixed is not None:
            return fixed
        return dropout if self.mode == "nr_rh_st" else 0.0


@dataclass
class Replacement:
    """Whether OpenNMT-py's own type names are ours in this process, and with which mode.

    Attributes:
        active: ``rnn``, ``brnn`` and ``ifrnn`` build this package's classes.
        mode: the mode where a configuration names none; None for nr_rh_st.
    """

    active: bool = False
    mode: str | None = None


#: Set by :mod:`sd_plugin.patches.opennmt`.
replacement = Replacement()


def add_options(parser: Any) -> None:
    """Add the ``sd_*`` options to an OpenNMT-py (configargparse) parser."""
    group = parser.add_argument_group("Structured dropout (sd-plugin)")
    for name, kwargs in OPTIONS.items():
        group.add(f"--{name}", f"-{name}", **{"default": None, **kwargs})


def is_ours(type_name: str, rnn_type: str) -> bool:
    """Whether an encoder or decoder type is built by this package."""
    if type_name in OWN_TYPES:
        return True
    return type_name in REPLACED_TYPES and rnn_type == "LSTM" and replacement.active


def uses_plugin(opt: Namespace) -> bool:
    """Whether a model with these options has an encoder or decoder of this package."""
    return any(is_ours(name, opt.rnn_type) for name in (opt.encoder_type, opt.decoder_type))


def is_structured(opt: Namespace) -> bool:
    """Whether a model with these options has structured dropout, which mode ``random`` has not."""
    return uses_plugin(opt) and _mode(opt) != "random"


def _mode(opt: Namespace) -> str:
    return getattr(opt, "sd_mode", None) or replacement.mode or "nr_rh_st"


def resolve(opt: Namespace) -> Settings:
    """Check the ``sd_*`` options of ``opt`` and write into it those that depend on the environment.

    Raises:
        UsageError: an option has no valid value, the options contradict each other, or the RNN is not an LSTM.
    """
    if opt.decoder_type == "sd_brnn":
        raise UsageError("decoder_type has no sd_brnn: use sd_rnn, also with encoder_type sd_brnn")
    if opt.rnn_type != "LSTM":
        raise UsageError(
            f"rnn_type {opt.rnn_type} has no structured dropout: use rnn_type LSTM, or encoder_type and "
            f"decoder_type rnn instead of {opt.encoder_type} and {opt.decoder_type}"
        )
    opt.sd_mode = _mode(opt)
    opt.sd_sampling = getattr(opt, "sd_sampling", None) or "exact"
    opt.sd_format = FORMAT
    recurrent, output = getattr(opt, "sd_recurrent_dropout", None), getattr(opt, "sd_output_dropout", None)
    try:
        check_mode(opt.sd_mode)
        check_sampling(opt.sd_sampling)
        for p in _values(opt.dropout):
            check_probability(p, "dropout")
        for name, p in (("sd_recurrent_dropout", recurrent), ("sd_output_dropout", output)):
            if p is not None:
                check_probability(p, name)
    except ValueError as error:
        told = str(error)
        raise UsageError(f"sd_{told}" if told.startswith(("mode ", "sampling ")) else told) from None
    if recurrent and opt.sd_mode != "nr_rh_st":
        raise UsageError(f"sd_recurrent_dropout needs sd_mode nr_rh_st, got {opt.sd_mode}")
    if output and opt.sd_mode == "random":
        raise UsageError("sd_output_dropout needs sd_mode nr_st or nr_rh_st, got random")
    return Settings(opt.sd_mode, opt.sd_sampling, recurrent, output)


def check_unknown(arguments: list[str], strict: bool) -> None:
    """Refuse a misspelt ``sd_*`` key, which OpenNMT-py would silently ignore to train or to build a vocabulary.

    Args:
        arguments: what the parser did not know, as ``--key``, ``--key=value`` or a lone value.
        strict: the program refuses any key it does not know (translation); training's own ones then too.

    Raises:
        UsageError: one of them is a misspelt ``sd_*`` key, or ``strict`` and one is any.
    """
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        meant_name = name.lower().replace("-", "_")
        close = get_close_matches(meant_name, OPTIONS, 1)
        if not argument.startswith("-") or not (meant_name.startswith("sd_") or (meant_name[:2] == "sd" and close)):
            continue
        if name in OPTIONS and not strict:
            continue
        if name in OPTIONS:
            raise UsageError(f"{name} is not an option of this program: it is saved in the model; leave it out")
        meant = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"unknown option {name}{meant} Valid: {', '.join(OPTIONS)}")


def check_checkpoint(opt: Namespace) -> None:
    """Refuse the options of a checkpoint that a newer version of this package wrote.

    Raises:
        UsageError: its format is newer, or it has an ``sd_*`` option this version does not know.
    """
    stored = {name for name in vars(opt) if name.startswith("sd_")}
    unknown = sorted(stored - set(OPTIONS) - {"sd_format"})
    if getattr(opt, "sd_format", FORMAT) > FORMAT or unknown:
        what = f" (option {', '.join(unknown)})" if unknown else f" (format {opt.sd_format}, this one reads {FORMAT})"
        raise UsageError(f"this checkpoint was written by a newer sd-plugin{what}: pip install -U sd-plugin")


def check_resumed(asked: Namespace, stored: Namespace) -> str | None:
    """Compare what a resumed training asks for with the checkpoint, whose model options hold.

    Args:
        asked: options of the run; stored: those of the checkpoint it continues.

    Returns:
        A warning to show, or None.

    Raises:
        UsageError: the run asks for structured dropout, or for an ``sd_*`` value, that the checkpoint overrides.
    """
    if not uses_plugin(stored):
        types = f"encoder_type {stored.encoder_type} and decoder_type {stored.decoder_type}"
        if uses_plugin(asked):
            raise UsageError(
                f"the checkpoint's {types} hold when it is resumed, without structured dropout: to continue it with "
                "structured dropout set SD_PLUGIN=1, or give --override_opts"
            )
        mode = getattr(stored, "sd_mode", None)
        if mode in (None, "random"):
            return None
        return (
            f"the checkpoint was trained with structured dropout (sd_mode {mode}) and continues without: its {types} "
            "are OpenNMT-py's own; set SD_PLUGIN=1 to keep it"
        )
    # A stock checkpoint names no mode and no sampling: what it then gets is what resolve() gives it.
    unset = {"sd_mode": replacement.mode or "nr_rh_st", "sd_sampling": "exact"}
    for name in OPTIONS:
        wanted, kept = getattr(asked, name, None), getattr(stored, name, None)
        kept = unset.get(name) if kept is None else kept
        if wanted is not None and wanted != kept:
            raise UsageError(
                f"{name} {wanted}: the checkpoint's own ({kept}) holds when it is resumed; leave {name} out, "
                "or give --override_opts"
            )
    kept = getattr(stored, "sd_mode", None)
    if replacement.mode is not None and kept not in (None, replacement.mode):
        return f"SD_PLUGIN={replacement.mode}: the checkpoint's sd_mode {kept} holds when it is resumed"
    return None


def continue_dropout(asked: Namespace, stored: Namespace, named: Collection[str]) -> None:
    """Give a resumed run the dropout of the checkpoint, with its schedule, unless it names its own.

    Args:
        asked: options of the run, changed in place; stored: those of the checkpoint.
        named: the options of ``asked`` that the user gave; the others have the host's defaults.

    Raises:
        UsageError: a probability that the run names is out of range.
    """
    if "dropout" in named or ("dropout_steps" in named and asked.dropout_steps != [0]):
        try:
            for p in asked.dropout:
                check_probability(p, "dropout")
        except ValueError as error:
            raise UsageError(str(error)) from None
        return
    # As OpenNMT-py did before it had schedules, a checkpoint may hold one number.
    asked.dropout = _values(getattr(stored, "dropout", asked.dropout))
    asked.dropout_steps = _values(getattr(stored, "dropout_steps", [0]))
    if "attention_dropout" not in named or len(asked.attention_dropout) != len(asked.dropout_steps):
        asked.attention_dropout = _values(getattr(stored, "attention_dropout", asked.attention_dropout))


def _values(option: Any) -> list[Any]:
    """An option of one value or several, as a list of its own."""
    return list(option) if isinstance(option, list) else [option]
