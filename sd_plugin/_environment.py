"""Reading the `SD_PLUGIN` environment variable.

The start-up hook imports this module in every interpreter, so it imports nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "SD_PLUGIN"
MODES = ("random", "nr_st", "nr_rh_st")

_OFF = ("0", "off", "false", "no")
_ON = ("1", "on", "true", "yes")


class Switch:
    """What the user asked of the plugin through the environment.

    Attributes:
        enabled: False when everything is switched off, including the registration of new names.
        replace: True when the host's own behaviour is to be replaced, not only added to.
        mode: the dropout mode to replace it with, one of `MODES`, or None to let the host's options choose.
        problem: one line about a value that was not understood (and is treated as unset), or None.
    """

    __slots__ = ("enabled", "mode", "problem", "replace")

    # No dataclass or NamedTuple: importing either costs more than the rest of the start-up hook.
    def __init__(self, enabled: bool, replace: bool, mode: "str | None" = None, problem: "str | None" = None) -> None:
        self.enabled = enabled
        self.replace = replace
        self.mode = mode
        self.problem = problem

    def _key(self) -> "tuple[bool, bool, str | None, str | None]":
        return self.enabled, self.replace, self.mode, self.problem

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Switch) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return "Switch(enabled={!r}, replace={!r}, mode={!r}, problem={!r})".format(*self._key())


def read_switch(environ: "Mapping[str, str]") -> Switch:
    """Reads `SD_PLUGIN` from `environ`, ignoring case and surrounding blanks.

    Unset or empty: add names to the hosts, replace nothing. `0`, `off`, `false`, `no`: do nothing at all.
    `1`, `on`, `true`, `yes`, or a mode: replace the hosts' own dropout too. Any other value reads as unset,
    with `problem` telling so; nothing is raised, because the reader may be an interpreter's start-up.
    """
    text = environ.get(VARIABLE, "").strip()
    value = text.lower()
    if value == "":
        return Switch(enabled=True, replace=False)
    if value in _OFF:
        return Switch(enabled=False, replace=False)
    if value in _ON:
        return Switch(enabled=True, replace=True)
    if value in MODES:
        return Switch(enabled=True, replace=True, mode=value)
    valid = ", ".join((*_OFF, *_ON, *MODES))
    problem = f"{VARIABLE}={text!r} is not understood and is ignored; valid: {valid}"
    return Switch(enabled=True, replace=False, problem=problem)
