"""How a patch drops units: the arguments that every `enable` takes, checked alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sd_plugin._environment import CASES, MODES
from sd_plugin.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How units are dropped in the modes ``nr_st`` and ``nr_rh_st``.

    Attributes:
        recurrent: units of the recurrent state too.
        case: of the paper's Fig. 1.
        sampling: of the structured cases.
    """

    recurrent: bool
    case: str
    sampling: str

    def lstm(self, recurrent_dropout: float, site: str) -> dict[str, Any]:
        """Options of a `StructuredDropoutLSTM` for one call."""
        return {
            "recurrent_dropout": recurrent_dropout,
            # Its modes know of structured and random only; what is dropped where is said by the probabilities.
            "mode": "nr_rh_st" if self.case in ("III", "IV") else "random",
            "locked": self.case in ("II", "IV"),
            "sampling": self.sampling,
            "site": site,
        }


def checked(mode: str, case: str | None, sampling: str, own_case: str) -> Settings | None:
    """The settings that arguments of `enable` amount to; None for mode ``random``, the host's own dropout.

    Args:
        own_case: the case of Fig. 1 that the host's own dropout is.

    Raises:
        UsageError: an argument is not one of the valid choices, or ``case`` is not that of mode ``random``.
    """
    check("mode", mode, MODES)
    if case is not None:
        check("case", case, CASES)
    if sampling != "exact":
        # Not imported for the default, that of the start-up hook: torch may be under import because this is.
        from sd_plugin.patterns import SAMPLINGS

        check("sampling", sampling, SAMPLINGS)
    if mode != "random":
        return Settings(mode == "nr_rh_st", case or "III", sampling)
    if case not in (None, own_case):
        raise UsageError(f"mode random is the host's own dropout, case {own_case}; case {case} needs nr_st or nr_rh_st")
    return None


def check(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise UsageError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
