"""``sd-plugin bench`` as a program: what it writes and prints, and how it ends where it cannot go on."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_plugin import UsageError
from sd_plugin.bench import cli, runner
from sd_plugin.bench.columns import DENSE, PHASES, STOCK
from sd_plugin.bench.folders import without_folders
from sd_plugin.bench.registry import WORKLOADS
from sd_plugin.bench.workload import Setup
from sd_plugin.kernels import BACKENDS

from .bench_program import TinyRun, bench

REPEATS = 2


def samples(values: Any) -> bool:
    """As many as repeats, all of them times."""
    return len(values) == REPEATS and all(isinstance(ms, float) and 0.0 < ms < math.inf for ms in values)


def test_every_workload_has_its_columns_products_and_phases(tiny_run: TinyRun) -> None:
    document = tiny_run.document
    assert document["scale"] == "tiny" and document["complete"]
    assert list(document["workloads"]) == list(WORKLOADS)
    for name, measured in document["workloads"].items():
        workload = WORKLOADS[name]
        assert list(measured["columns"]) == list(workload.columns)
        for column in measured["columns"].values():
            assert samples(column["step_ms"])
            assert len(column["loss"]) == REPEATS and None not in column["loss"]
        assert [p["name"] for p in measured["products"]] == [p.name for p in workload.products(Setup(tiny=True))]
        for product in measured["products"]:
            assert list(product["ms"]) == list(PHASES)
            for timed in product["ms"].values():
                assert set(timed) == {STOCK, DENSE, *product["kept"]}
                assert all(samples(values) for values in timed.values())
            assert samples(product["pack_ms"])
        assert measured["lost_hints"] == {} and measured["sizes"] and measured["note"]


def test_sweeps_cover_every_axis(tiny_run: TinyRun) -> None:
    sweeps = tiny_run.document["sweeps"]
    assert {point["axis"] for point in sweeps} == {"p", "H", "B", "T"}
    for point in sweeps:
        assert point[point["axis"]] == point["value"]
        assert all(samples(values) for values in point["layer_ms"].values()) and len(point["layer_ms"]) == 3
        assert [product["name"] for product in point["products"]] == ["layer.input", "layer.recurrent"]


def test_the_file_says_where_and_how_and_names_no_folder(tiny_run: TinyRun) -> None:
    document, text = tiny_run.document, tiny_run.path.read_text(encoding="utf-8")
    assert document["settings"]["threads"] == 1 and document["settings"]["seed"] == 1
    assert document["machine"]["cpu"] and document["machine"]["cores"] and document["machine"]["isa"]
    assert document["versions"]["torch"] and document["versions"]["sd-plugin"]
    assert document["backend"]["name"] in BACKENDS
    assert document["backend"]["name"] != "cpu" or document["backend"]["build"]["compiler"]
    assert document["git"] is None or re.fullmatch(r"[0-9a-f]{40}", document["git"]["commit"])
    assert re.match(r"\d{4}-\d\d-\d\dT", document["date"])
    assert document["command"].startswith("sd-plugin bench --scale tiny") and "tiny.json" in document["command"]
    for folder in (tiny_run.path.parent, Path.home(), Path(sys.prefix), Path(__file__).parents[2]):
        assert str(folder) == "/" or str(folder) not in text
    assert not re.search(r'["= ]/\w', text)


def test_what_is_printed_cannot_be_taken_for_a_result(tiny_run: TinyRun) -> None:
    assert "TINY SHAPES" in tiny_run.printed.splitlines()[0]
    assert tiny_run.printed.count("(tiny)") >= 4 * len(WORKLOADS)
    for workload in WORKLOADS.values():
        assert f"{workload.title}: " in tiny_run.printed
    assert "LSTM part only" in tiny_run.printed


@pytest.mark.exhaustive
def test_memory_is_measured_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    done = bench(
        *("--scale", "tiny", "--workload", "ner", "--columns", "stock,nr_rh_st", "--repeats", 1, "--warmup", 0),
        *("--no-phases", "--json", path),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    columns = json.loads(path.read_text())["workloads"]["ner"]["columns"]
    assert list(columns) == ["stock", "nr_rh_st"]
    for column in columns.values():
        memory = column["memory"]
        assert memory["peak"] > 20 and memory["increase"] >= 0
        assert memory["increase"] == pytest.approx(memory["peak"] - memory["before"], abs=0.2)


WRONG = [
    (["--workload", "nothing"], "'nothing'", "zaremba-medium, "),
    (["--workload", "ner,nothing"], "'nothing'", "zaremba-medium, "),
    (["--columns", "fast"], "'fast'", "stock, ours-dense, nr_st, nr_rh_st"),
    (["--device", "tpu"], "'tpu'", "cpu, cuda"),
    (["--precision", "fp16"], "--device cpu --precision 'fp16'", "valid: all, fp32"),
    (["--precision", "fp32,half"], "'half'", "valid: all, fp32"),
    (["--repeats", "0"], "--repeats", "at least 1"),
    (["--repeats", "many"], "--repeats", "integer"),
    (["--warmup", "-1"], "--warmup", "at least 0"),
    (["--threads", "0"], "--threads", "at least 1"),
    (["--threads", "100000"], "--threads", "at most "),
    (["--threads", "9" * 5000], "--threads", "integer"),
    (["--seed", "-1"], "--seed", "at least 0"),
    (["--seed", "9" * 4000], "--seed", "at most 9223372036854775807"),
    (["--scale", "big"], "'big'", "full, tiny"),
    (["--host", "awd-lstm"], "'awd-lstm'", "NAME=DIR"),
    (["--host", "other=."], "'other'", "awd-lstm"),
    (["--host", "awd-lstm=nowhere"], "nowhere", "no folder"),
    (["--json", "nowhere/a.json"], "nowhere", "no folder"),
    (["--json", "."], "--json", "folder"),
    (["--nonsense"], "--nonsense", ""),
    (["stray"], "stray", ""),
]


@pytest.mark.parametrize(("arguments", "culprit", "valid"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_arguments_are_named_in_one_line(arguments: list[str], culprit: str, valid: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.run(arguments)
    told = str(caught.value)
    assert culprit in told and valid in told and "\n" not in told


def test_a_mistake_ends_the_program_with_two(tmp_path: Path) -> None:
    done = bench("--workload", "nothing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sd-plugin: error: --workload 'nothing'")


def test_a_backend_that_is_not_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "abacus")
    with pytest.raises(UsageError, match="abacus"):
        cli.run(["--scale", "tiny"])


def test_a_result_is_not_replaced_unless_told_to(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists; --force replaces it"):
        cli.run(["--json", str(path)])
    assert path.read_text() == "precious"


QUICK = ["--scale", "tiny", "--repeats", "1", "--warmup", "0", "--no-phases", "--no-memory"]


def test_no_more_threads_than_processors_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment has torch take: with very many OpenMP ends the process."""
    measured: list[runner.Settings] = []
    monkeypatch.setattr(cli, "measure", lambda settings, json: measured.append(settings))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    for asked in (2, 100_000):
        monkeypatch.setattr(torch, "get_num_threads", lambda asked=asked: asked)
        assert cli.run(QUICK) == 0
    assert [settings.threads for settings in measured] == [2, 3]


def test_an_interrupted_run_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, measure = tmp_path / "a.json", runner._workload

    def interrupted(workload: Any, *arguments: Any) -> Any:
        if workload.name == "ner":
            raise KeyboardInterrupt
        return measure(workload, *arguments)

    monkeypatch.setattr(runner, "_workload", interrupted)
    path.write_text("old")
    arguments = [*QUICK, "--workload", "zaremba-medium", "--workload", "ner", "--json", str(path), "--force"]
    assert cli.run(arguments) == cli.INTERRUPTED
    document = json.loads(path.read_text())
    assert list(document["workloads"]) == ["zaremba-medium"] and not document["complete"]
    assert "interrupted; the finished workloads are in" in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_what_it_needs_is_said_in_a_line(tmp_path: Path, without: Callable[..., dict[str, str]], module: str) -> None:
    done = bench("--help", cwd=tmp_path, PYTHONPATH=without(module)["PYTHONPATH"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sd-plugin: error: sd-plugin bench needs typer and rich: pip install 'sd-plugin[bench]'\n"


def test_progress_is_told_as_often_as_announced() -> None:
    settings = runner.Settings(
        workloads=["zaremba-medium", "awd-lstm"], repeats=1, warmup=1, memory=False, sweeps=True, tiny=True
    )
    told: list[str | None] = []
    runner.run(settings, told.append, lambda document: None)
    assert told.count(None) == runner.parts(settings)
    assert [title for title in told if title] == ["Zaremba medium", "AWD-LSTM", "sweeps"]


def test_folders_are_cut_from_what_is_written() -> None:
    cut = without_folders("--json /a/b/c.json --host awd-lstm=/d/e x=1 rel/f")
    assert cut == "--json c.json --host awd-lstm=e x=1 rel/f"
