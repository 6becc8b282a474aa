"""For all tests: ways to run programs, products that skip however small they are, and Hypothesis profiles.

`--hypothesis-profile=explore` looks further than the default.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .environ import SKIP_FROM, clean
from .forks import Forks, forks

# Before sd_plugin is imported, here and in the programs that tests start. What is left to torch because it is small has
# tests of its own.
os.environ[SKIP_FROM] = "0"

settings.register_profile(
    "ci",
    # The same examples in every run: a failure is the change's, not the draw's.
    derandomize=True,
    deadline=None,
    max_examples=40,
    # Fixtures here only force a backend or reset counters; that need not be redone for each example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile("ci")


@pytest.fixture(scope="module", autouse=True)
def what_stays_is_not_looked_through() -> None:
    """By the garbage collector, nor by who asks it for all objects: half a million, of all that was imported."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs programs that need no start of their own, in forks of one Python."""
    kept = clean("PYTHON")
    # A fixed order of sets is what ner_main.py would start itself again for.
    env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with forks(tmp_path_factory.mktemp("output"), env) as fork:
        yield fork


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment in which modules look as if they were not installed."""

    def environment(*modules: str) -> dict[str, str]:
        folder = tmp_path / "not installed"
        folder.mkdir()
        for module in modules:
            text = f"raise ModuleNotFoundError('No module named {module}', name={module!r})\n"
            (folder / f"{module}.py").write_text(text)
        # Searched before the folder of installed packages.
        return {**os.environ, "PYTHONPATH": str(folder)}

    return environment
