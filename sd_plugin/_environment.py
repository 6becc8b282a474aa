"""Reading the plugin's environment variables.

The start-up hook imports this module in every interpreter in which one of them is set, so it imports nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "SD_PLUGIN"
TARGETS_VARIABLE = "SD_PLUGIN_TARGETS"
CASE_VARIABLE = "SD_PLUGIN_CASE"
RECURRENT_VARIABLE = "SD_PLUGIN_RECURRENT_DROPOUT"
REPORT_VARIABLE = "SD_PLUGIN_REPORT"
CHECK_VARIABLE = "SD_PLUGIN_CHECK"
SKIP_FROM_VARIABLE = "SD_PLUGIN_SKIP_FROM"
MODES = ("random", "nr_st", "nr_rh_st")
CASES = ("I", "II", "III", "IV")
# What SD_PLUGIN_TARGETS takes: the hosts, each by the name of its patch module (but `torch` is `torch_nn`).
TARGETS = ("awd_lstm", "fastai", "opennmt", "targer", "torch")
# Any program has nn.LSTM and nn.Dropout, so that target has to be asked for by name.
DEFAULT_TARGETS = ("awd_lstm", "fastai", "opennmt", "targer")

_OFF = ("0", "off", "false", "no")
_ON = ("1", "on", "true", "yes")


class Switch:
    """What the user asked of the plugin through the environment.

    Attributes:
        enabled: False when everything is switched off, including the registration of new names.
        replace: True when the hosts' own behaviour is to be replaced, not only added to.
        mode: the dropout mode to replace it with, one of `MODES`, or None to let the host's options choose.
        targets: the hosts that `replace` speaks of, of `TARGETS`.
        problem: one line about a value that was not understood (and is treated as unset), or None.
    """

    __slots__ = ("enabled", "mode", "problem", "replace", "targets")

    # No dataclass or NamedTuple: importing either costs more than the rest of the start-up hook.
    def __init__(
        self,
        enabled: bool,
        replace: bool,
        mode: "str | None" = None,
        problem: "str | None" = None,
        targets: "tuple[str, ...]" = DEFAULT_TARGETS,
    ) -> None:
        self.enabled = enabled
        self.replace = replace
        self.mode = mode
        self.problem = problem
        self.targets = targets

    def replaces(self, target: str) -> bool:
        """The behaviour of this host, one of `TARGETS`, is to be replaced."""
        return self.enabled and self.replace and target in self.targets

    def _key(self) -> "tuple[bool, bool, str | None, str | None, tuple[str, ...]]":
        return self.enabled, self.replace, self.mode, self.problem, self.targets

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Switch) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return "Switch(enabled={!r}, replace={!r}, mode={!r}, problem={!r}, targets={!r})".format(*self._key())


def read_switch(environ: "Mapping[str, str]") -> Switch:
    """Reads `SD_PLUGIN` and `SD_PLUGIN_TARGETS` from `environ`, ignoring case and surrounding blanks.

    Unset or empty: add names to the hosts, replace nothing. `0`, `off`, `false`, `no`: do nothing at all.
    `1`, `on`, `true`, `yes`, or a mode: replace the hosts' own dropout too. Any other value reads as unset,
    with `problem` telling so; nothing is raised, because the reader may be an interpreter's start-up.
    """
    targets, problem = _read_targets(environ)
    text = environ.get(VARIABLE, "").strip()
    value = text.lower()
    if value == "":
        return Switch(enabled=True, replace=False, problem=problem, targets=targets)
    if value in _OFF:
        return Switch(enabled=False, replace=False, problem=problem, targets=targets)
    if value in _ON:
        return Switch(enabled=True, replace=True, problem=problem, targets=targets)
    if value in MODES:
        return Switch(enabled=True, replace=True, mode=value, problem=problem, targets=targets)
    valid = ", ".join((*_OFF, *_ON, *MODES))
    unknown = f"{VARIABLE}={text!r} is not understood and is ignored; valid: {valid}"
    return Switch(enabled=True, replace=False, problem=unknown if problem is None else f"{unknown}; {problem}")


def _read_targets(environ: "Mapping[str, str]") -> "tuple[tuple[str, ...], str | None]":
    """The hosts that the user named, and one line about names that were not understood (and are ignored)."""
    text = environ.get(TARGETS_VARIABLE, "")
    named = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not named:
        return DEFAULT_TARGETS, None
    unknown = [name for name in named if name not in TARGETS]
    problem = None
    if unknown:
        problem = f"{TARGETS_VARIABLE}={text!r}: {', '.join(unknown)} ignored; valid: {', '.join(TARGETS)}"
    return tuple(name for name in TARGETS if name in named), problem


def read_case(environ: "Mapping[str, str]") -> "str | None":
    """The case of the paper's Fig. 1 that `SD_PLUGIN_CASE` names, of `CASES`; None when it is unset.

    Raises:
        ValueError: it names none.
    """
    text = environ.get(CASE_VARIABLE, "").strip()
    if not text:
        return None
    if text.upper() not in CASES:
        raise ValueError(f"{CASE_VARIABLE}={text!r} is no case; valid: {', '.join(CASES)}")
    return text.upper()


def read_recurrent_dropout(environ: "Mapping[str, str]") -> "float | None":
    """The probability in `SD_PLUGIN_RECURRENT_DROPOUT`; None when it is unset.

    Raises:
        ValueError: it is not a number in [0, 1).
    """
    text = environ.get(RECURRENT_VARIABLE, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{RECURRENT_VARIABLE}={text!r} must be a number in [0, 1)")
    return value


def read_report(environ: "Mapping[str, str]") -> bool:
    """Whether `SD_PLUGIN_REPORT` asks for the report when a program ends; False when it is unset.

    Raises:
        ValueError: it says neither yes nor no.
    """
    return _read_yes_or_no(environ, REPORT_VARIABLE)


def read_check(environ: "Mapping[str, str]") -> bool:
    """Whether `SD_PLUGIN_CHECK` asks for hints to be verified; False when it is unset.

    Raises:
        ValueError: it says neither yes nor no.
    """
    return _read_yes_or_no(environ, CHECK_VARIABLE)


def read_skip_from(environ: "Mapping[str, str]") -> "int | None":
    """The multiply-adds in `SD_PLUGIN_SKIP_FROM`; None when it is unset.

    Raises:
        ValueError: it is not a whole number that is not negative.
    """
    text = environ.get(SKIP_FROM_VARIABLE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(
            f"{SKIP_FROM_VARIABLE}={text[:40]!r} must be a whole number of multiply-adds, such as 0 or 96000000"
        )
    return int(text)


def _read_yes_or_no(environ: "Mapping[str, str]", variable: str) -> bool:
    text = environ.get(variable, "").strip()
    value = text.lower()
    if value not in ("", *_OFF, *_ON):
        raise ValueError(f"{variable}={text!r} is not understood; valid: {', '.join((*_OFF, *_ON))}")
    return value in _ON
