"""How units are dropped in a program on torch.nn: the arguments of its `enable`, checked."""

from __future__ import annotations

from dataclasses import dataclass

from sd_plugin._environment import CASES, MODES
from sd_plugin.errors import UsageError

from .. import _settings as shared


@dataclass(frozen=True)
class Settings(shared.Settings):
    """How units are dropped.

    Attributes:
        recurrent_dropout: of units of the recurrent state; None for that of the dropout around the LSTM.
        batch_first: the layout of activations; None for that of the LSTMs of their width.
    """

    recurrent_dropout: float | None
    batch_first: bool | None


def checked(
    mode: str, case: str | None, sampling: str, recurrent_dropout: float | None, batch_first: bool | None
) -> Settings | None:
    """The settings that arguments of `enable` amount to; None for torch's own dropout.

    Raises:
        UsageError: an argument is not one of the valid choices, or without effect in ``mode``.
    """
    shared.check("mode", mode, MODES)
    if case is not None:
        shared.check("case", case, CASES)
    if sampling != "exact":
        # Not imported for the default, that of the start-up hook: torch may be under import because this is.
        from sd_plugin.patterns import SAMPLINGS

        shared.check("sampling", sampling, SAMPLINGS)
    if recurrent_dropout is not None and not _is_probability(recurrent_dropout):
        raise UsageError(f"recurrent_dropout must be a number in [0, 1), got {recurrent_dropout!r}")
    if recurrent_dropout and mode != "nr_rh_st":
        raise UsageError(f"mode {mode} has no recurrent dropout; use nr_rh_st, or leave recurrent_dropout out")
    if mode == "random":
        if case not in (None, "I"):
            raise UsageError(f"mode random is torch's own dropout, case I; case {case} needs nr_st or nr_rh_st")
        return None
    return Settings(mode == "nr_rh_st", case or "III", sampling, recurrent_dropout, batch_first)


def _is_probability(p: object) -> bool:
    """It is a number in [0, 1)."""
    return isinstance(p, (int, float)) and 0 <= p < 1
