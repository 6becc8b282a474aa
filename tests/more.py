"""Cases of a test that show again, on other examples, what its first cases show."""

from __future__ import annotations

import pytest


def more(*cases: object, ids: list[str] | None = None) -> list[object]:
    """Cases for ``pytest.mark.parametrize`` that ``make exhaustive`` runs and ``make test`` leaves out.

    Args:
        cases: each a value, or a tuple of values for several arguments.
        ids: their names in pytest's list.

    Example::

        @pytest.mark.parametrize("mode", ["nr_rh_st", *more("nr_st", "random")])
    """
    names = ids or [None] * len(cases)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name, marks=pytest.mark.exhaustive)
        for case, name in zip(cases, names, strict=True)
    ]
