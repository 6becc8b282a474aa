"""Figures and Markdown tables, drawn from the file alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..forks import Forks
from ..more import more
from ..patience import PATIENCE
from .bench_program import TinyRun

ROOT = Path(__file__).resolve().parents[2]
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(fork: Forks) -> Program:
    """Runs one of benchmarks/."""
    return lambda name, *arguments: fork(ROOT / "benchmarks" / name, arguments, cwd=ROOT.parent, env=os.environ)


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), *more(("svg", b"<?xml"))])
def test_figures_of_steps_and_sweeps(
    program: Program, tiny_run: TinyRun, tmp_path: Path, kind: str, start: bytes
) -> None:
    pytest.importorskip("matplotlib")
    done = program("plot.py", tiny_run.path, "--out", tmp_path / "figures", "--format", kind)
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "figures").iterdir())
    expected = ["speedups", *(f"sweep-{axis}" for axis in "BHTp")]
    assert [file.name for file in files] == [f"tiny-{name}.{kind}" for name in expected]
    assert all(file.read_bytes().startswith(start) for file in files)
    if kind == "svg":
        text = files[0].read_text(encoding="utf-8")
        assert all(label in text for label in ("NR+RH+ST", "whole step", "AWD-LSTM", "no result"))


def test_an_unfinished_run_is_drawn_as_far_as_it_goes(program: Program, tiny_run: TinyRun, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = dict(tiny_run.document)
    some = {name: document["workloads"][name] for name in ("awd-lstm",)}
    path = tmp_path / "some.json"
    path.write_text(json.dumps({**document, "workloads": some, "sweeps": [], "complete": False}))
    done = program("plot.py", path, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "some-speedups.png")]


@pytest.mark.parametrize("name", ["plot.py", "table.py"])
def test_what_is_no_benchmark_is_told_in_a_line(
    tmp_path: Path, without: Callable[..., dict[str, str]], name: str
) -> None:
    """By programs that need no torch."""
    if name == "plot.py":
        pytest.importorskip("matplotlib")
    path = tmp_path / "other.json"
    path.write_text("{}")
    # A folder is made only for what can be drawn.
    out = ["--out", str(tmp_path / "new")] if name == "plot.py" else []
    command = [sys.executable, str(ROOT / "benchmarks" / name), str(path), *out]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT.parent, env=without("torch")
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "new").exists()
    (line,) = done.stderr.splitlines()
    assert line == f"{name}: {path} was not written by sd-plugin bench"


@pytest.mark.parametrize("name", ["plot.py", "table.py", "cuda_resources.py"])
def test_a_wrong_command_line_is_told_in_a_line(program: Program, name: str) -> None:
    if name == "plot.py":
        pytest.importorskip("matplotlib")
    done = program(name, "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "--nonsense" in line


def test_tables_are_markdown_and_say_they_are_tiny(program: Program, tiny_run: TinyRun) -> None:
    done = program("table.py", tiny_run.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TINY SHAPES")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert sum("(tiny)" in row for row in rows) >= 2 * 4 * len(tiny_run.document["workloads"])
    assert "- NER (LSTM part): LSTM part only" in done.stdout
    only = program("table.py", tiny_run.path, "--only", "steps").stdout
    assert "**whole training steps**" in only and "by themselves" not in only
    assert program("table.py", tiny_run.path, "--only", "x").returncode == 2


def test_small_products_are_timed_both_ways(program: Program) -> None:
    done = program("small_products.py", "--small", "--repeats", 1, "--p", 0.5)
    assert done.returncode == 0, done.stderr
    *_, linear, cells = [line.split(" | ") for line in done.stdout.splitlines()]
    assert (linear[0], cells[0]) == ("| linear, 32 x 256 -> 256", "| cells, 64 units, batch 32")
    assert all(float(cell.strip(" |")) > 0 for row in (linear, cells) for cell in row[2:])
    refused = program("small_products.py", "--p", 1)
    assert refused.returncode == 2
    assert "between 0 and 1" in refused.stderr
