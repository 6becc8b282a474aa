"""What the tests of the benchmark share: one run of the program over everything, at tiny shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from sd_plugin import stats

from ..forks import Forks
from .bench_program import TinyRun, environment


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Threads and counters are of the whole process; tests leave them as they were."""
    threads = torch.get_num_threads()
    stats.reset()
    yield
    stats.reset()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, fork: Forks) -> TinyRun:
    """Every workload, column, phase and sweep, once."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "tiny.json"
    arguments = ("--scale", "tiny", "--repeats", 2, "--warmup", 1, "--threads", 1, "--sweeps", "--no-memory")
    done = fork("-m", ["sd_plugin", "bench", *arguments, "--json", path], cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    return TinyRun(path, json.loads(path.read_text(encoding="utf-8")), done.stdout)
