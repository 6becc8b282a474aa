"""The counters of a test that dropped something."""

from __future__ import annotations

from sd_plugin import stats
from sd_plugin.stats import Site


def sites() -> dict[str, Site]:
    """The counters by site. There has to be one: of none, ``all(...)`` says nothing."""
    found = stats.sites()
    assert found, "nothing was counted"
    return found
