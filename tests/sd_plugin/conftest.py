"""Counters are the process's own, so every test starts from none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sd_plugin import cell, stats


@pytest.fixture(autouse=True)
def no_counts() -> Iterator[None]:
    stats.reset()
    yield
    stats.reset()


@pytest.fixture
def steps_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that are run step by step skip, however small they are."""
    monkeypatch.setitem(cell.PAYS_FROM, "cpu", 0)
