"""Counters are the process's own, so every test starts from none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sd_plugin import stats


@pytest.fixture(autouse=True)
def no_counts() -> Iterator[None]:
    stats.reset()
    yield
    stats.reset()
