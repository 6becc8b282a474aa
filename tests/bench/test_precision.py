"""Precisions: torch's switches, what is stored and told of each, and files from before there were any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_plugin import UsageError
from sd_plugin.bench import cli, memory, precision, results, runner, summary
from sd_plugin.bench.columns import BF16, DENSE, FP16, FP32, NR_RH_ST, PRECISIONS, STOCK, TF32
from sd_plugin.bench.registry import WORKLOADS
from sd_plugin.bench.workload import Setup

from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
X = "\N{MULTIPLICATION SIGN}"


def switches() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("name", PRECISIONS)
def test_switches_of_torch_are_set_inside_and_restored(name: str) -> None:
    before = switches()
    with precision.settings(name):
        assert switches() == (name != FP32, False)
        with precision.products(name, of_lstm=True):
            assert switches() == (name != FP32, name == TF32)
        with precision.products(name, of_lstm=False):
            assert switches() == (name != FP32, False)
    assert switches() == before
    with pytest.raises(KeyError), precision.settings(name):
        raise KeyError
    assert switches() == before


@pytest.mark.parametrize(("name", "dtype"), [(FP32, torch.float32), (BF16, torch.bfloat16), (FP16, torch.float16)])
def test_forward_and_loss_run_in_the_precision(name: str, dtype: torch.dtype) -> None:
    setup = Setup(tiny=True, precision=name)
    with setup.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype == precision.dtype(name)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def require_autocast(dtype: torch.dtype = torch.bfloat16) -> None:
    """Skip the test where the baseline, torch's own LSTM, cannot run."""
    if reason := precision.refusal(dtype, torch.device("cpu")):
        pytest.skip(reason)


def test_a_refusal_says_what_torch_cannot_do() -> None:
    lstm, x = torch.nn.LSTM(3, 4), torch.ones(2, 1, 3)
    for dtype in (torch.bfloat16, torch.float16):
        if reason := precision.refusal(dtype, torch.device("cpu")):
            assert str(dtype) in reason and "\n" not in reason
            with pytest.raises(RuntimeError), torch.autocast("cpu", dtype=dtype):
                lstm(x)
        else:
            with torch.autocast("cpu", dtype=dtype):
                assert lstm(x)[0].dtype == dtype


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_every_column_trains_under_autocast(workload: Any) -> None:
    """On a CPU, where autocast has no LSTM of its own for float16."""
    require_autocast()
    setup = Setup(tiny=True, precision=BF16)
    for column in workload.columns:
        training = workload.build(column, setup)
        seen: set[torch.dtype] = set()
        for module in training.model.modules():
            if isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell, torch.nn.Linear)):
                module.register_forward_hook(lambda _, __, y, seen=seen: seen.add(first(y).dtype))
        assert all(training.step().isfinite() for _ in range(2)), column
        assert torch.bfloat16 in seen, column
        assert all(parameter.dtype == torch.float32 for parameter in training.model.parameters())


def first(y: Any) -> torch.Tensor:
    """The first tensor of what a module returned."""
    return y if isinstance(y, torch.Tensor) else first(y[0])


@pytest.fixture(scope="module")
def document() -> results.Document:
    require_autocast()
    settings = runner.Settings(
        workloads=["zaremba-medium", "awd-lstm"],
        columns=[STOCK, DENSE, NR_RH_ST],
        precisions=[FP32, BF16],
        repeats=1,
        warmup=0,
        memory=False,
        tiny=True,
    )
    told: list[str | None] = []
    made = runner.run(settings, told.append, lambda document: None)
    assert told.count(None) == runner.parts(settings)
    return made


def test_the_first_precision_is_where_files_of_one_have_it(document: results.Document) -> None:
    assert document["settings"]["precisions"] == [FP32, BF16]
    for name, measured in document["workloads"].items():
        assert list(measured["precisions"]) == [BF16]
        other = measured["precisions"][BF16]
        assert measured["columns"].keys() == other["columns"].keys() == {STOCK, DENSE, NR_RH_ST}
        assert [p["name"] for p in other["products"]] == [p.name for p in WORKLOADS[name].products(Setup(tiny=True))]
        losses = [run["columns"][STOCK]["loss"] for run in (measured, other)]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_tables_have_every_precision_and_tell_the_fastest_stock(document: results.Document, tmp_path: Path) -> None:
    for table in (summary.step_table(document), summary.phase_table(document)):
        titles = list(dict.fromkeys(row[0] for row in table.rows))
        assert titles == [
            f"{workload}, {name}" for workload in ("Zaremba medium", "AWD-LSTM") for name in ("fp32", "bf16")
        ]
    assert summary.PRECISION in summary.head(document)
    path = tmp_path / "two.json"
    results.save(document, path)
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert "| Zaremba medium, bf16 | NR+RH+ST (tiny) |" in printed
    assert "- AWD-LSTM: the fastest stock is " in printed


def run_of(stock: float, ours: float) -> dict[str, Any]:
    columns = {STOCK: {"step_ms": [stock], "loss": [1.0]}, NR_RH_ST: {"step_ms": [ours], "loss": [None]}}
    return {"columns": columns, "products": [], "fallbacks": [], "lost_hints": {"s": 1}}


def test_ratios_are_to_stock_of_the_same_precision() -> None:
    workload = {
        "title": "W",
        "note": "n",
        **run_of(4.0, 2.0),
        "precisions": {FP32: run_of(6.0, 2.0), FP16: run_of(3.0, 2.5)},
    }
    settings = {"columns": [STOCK, NR_RH_ST], "device": "cuda", "precisions": [TF32, FP32, FP16]}
    document = {"settings": settings, "workloads": {"w": workload}, "scale": "full"}
    rows = {(row[0], row[1]): row[3] for row in summary.step_table(document).rows}
    assert rows["W, fp32+TF32", "NR+RH+ST"] == f"2.00{X}"
    assert rows["W, fp32", "NR+RH+ST"] == f"3.00{X}"
    assert rows["W, fp16", "NR+RH+ST"] == f"1.20{X}"
    (told,) = summary.fastest_stock(document)
    assert told == (
        f"W: the fastest stock is fp16, 3.00 ms; NR+RH+ST to that one: fp32+TF32 1.50{X}, fp32 1.50{X}, fp16 1.20{X}."
    )
    notes = summary.notes(document)
    assert "W, fp16, NR+RH+ST: the loss was not finite; do not trust its time." in notes
    assert "W, fp32: 1 patterns of s reached no product that could skip." in notes


def test_a_file_from_before_precisions_is_read_as_before() -> None:
    document = results.load(ROOT / "benchmarks" / "results" / "cpu.json")
    if "precisions" in document["settings"]:
        pytest.skip("the file is of this version")
    assert document["schema"] == 1
    assert [title for title, _ in summary.runs(document)] == [w["title"] for w in document["workloads"].values()]
    assert summary.PRECISION not in summary.head(document) and summary.fastest_stock(document) == []
    document["settings"]["device"] = "cuda"
    assert all(title.endswith(", fp32+TF32") for title, _ in summary.runs(document))


@pytest.mark.exhaustive
def test_memory_is_measured_in_the_precision() -> None:
    setup = Setup(tiny=True, precision=BF16)
    assert memory.measure("ner", STOCK, setup, 1)["peak"] > 20


def test_defaults_are_those_of_the_device() -> None:
    assert cli._precisions(None, "cpu") == [FP32]
    assert cli._precisions(None, "cuda") == [TF32, FP32, FP16]
    assert cli._precisions(["bf16,tf32"], "cuda") == [TF32, BF16]
    assert cli._precisions(["all"], "cuda") == list(PRECISIONS)
    with pytest.raises(UsageError, match="--device cpu --precision 'tf32' is not valid; valid: all, fp32"):
        cli._precisions(["tf32"], "cpu")


def test_the_file_of_the_program_names_its_precisions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    quick = ["--scale", "tiny", "--repeats", "1", "--warmup", "0", "--no-phases", "--no-memory"]
    assert cli.run([*quick, "--workload", "ner", "--precision", "fp32", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["settings"]["precisions"] == [FP32] and "precisions" not in document["workloads"]["ner"]
