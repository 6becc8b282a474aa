"""The tables of the CUDA kernels: their floors, the times that a GPU's file gives them, and wrong use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Without it the script ends at once, and would end pytest.
pytest.importorskip("typer")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cuda_resources
import cuda_tables
import cuda_work
import gpu_check_machine
import gpu_check_report

from sd_plugin.kernels.cuda.precision import Precision

from ..forks import Forks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "cuda_resources.py"
RESULTS = ROOT / "benchmarks" / "results" / "cuda_resources.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(fork: Forks) -> Program:
    """Runs ``cuda_resources.py``; tests/test_documents.py starts it in a Python of its own."""
    return lambda *arguments: fork(SCRIPT, arguments, cwd=ROOT, env=os.environ)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the file and of the document."""
    for path in (RESULTS, DOCUMENT):
        shutil.copy(path, tmp_path)
    return tmp_path / RESULTS.name, tmp_path / DOCUMENT.name


def checked(path: Path, **changes: Any) -> None:
    """A file of ``gpu_check.py``, as far as it is read."""
    times = {"forward": 9.9, "device_forward": 3.21, "device_backward": 12.34}
    parts = {
        "our layer, auto, skipping": {"zaremba-medium tf32": times, "awd-lstm fp32": times, "ner fp16": "no kernel"},
        "our layer, auto, dense": {"error": "it did not end within 60 s"},
        "products, fp32": {"zaremba-medium": {"FP": {"dense": 90.0, "0.5": 56.78}}, "not_measured": "and the rest"},
        "grid barrier": {"82 blocks": {"counter_us": 1.11}, "132 blocks": {"counter_us": 1.44}},
    }
    document = {
        "kind": gpu_check_report.KIND, "rehearsal": False, "machine": {"gpu": "NVIDIA H100 80GB HBM3"},
        "sections": {"device": {"skipped": "0 of 480 s left"}, "micro": {"seconds": 1.0, "parts": parts}}, **changes,
    }  # fmt: skip
    path.write_text(json.dumps(document), encoding="utf-8")


def test_measured_times_come_from_the_files_of_a_gpu(program: Program, files: tuple[Path, Path]) -> None:
    file, document = files
    checked(file.with_name("gpu_check_h100.json"))
    checked(file.with_name("gpu_check_h100_bench.json"), kind="sd-plugin bench")
    checked(file.with_name("gpu_check_x86_64.json"), rehearsal=True, machine={"gpu": None})
    done = program("--no-compile", "--json", file, "--into", document)
    assert done.returncode == 0, done.stderr
    lines = document.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    last = {tuple(row[:3]): row[-1] for row in rows}
    assert last["Zaremba medium, 650, B 20", "TF32", "325"] == "3.21 / 12.3"
    assert last["Zaremba medium, 650, B 20", "TF32", "all"] == "unmeasured"
    assert last["AWD-LSTM, 1150, B 20", "float32", "575"] == "3.21 / 12.3 (stack)"
    assert last["NER, 100, B 10", "float16", "50"] == "unmeasured"
    assert last["`gemm_fp`", "float32", "35 x 20 x 650 -> 2600, p 0.5"] == "56.8"
    assert last["`gemm_bp`", "float32", "35 x 20 x 650 -> 2600, p 0.5"] == "unmeasured"
    assert last["barrier of all blocks, µs", "1.2", "1.44"] == "1.44"
    assert sum(row[-1] == "measured, µs, NVIDIA H100 80GB HBM3" for row in rows) == 2
    assert "gpu_check_h100.json" in "\n".join(lines[:20])
    assert "x86_64" not in "\n".join(lines)


def test_what_is_looked_up_is_called_so_by_gpu_check() -> None:
    assert cuda_tables.MEASURED_KIND == gpu_check_report.KIND
    names = {precision.of_backend: precision.name for precision in gpu_check_machine.PRECISIONS}
    assert {precision.name: name for precision, name in cuda_work.MEASURED_AS.items()}.items() <= names.items()
    for layer in cuda_work.LAYERS:
        stack = gpu_check_machine.SHAPES[layer.stack]
        hidden = [outputs for _, outputs in stack.layers]
        assert layer.hidden in hidden
        assert layer.alone == (len(set(hidden)) == 1)
        assert (layer.batch, layer.p) == (stack.batch, stack.p)
    stack = gpu_check_machine.SHAPES[cuda_work.PRODUCT_STACK]
    assert (stack.steps, stack.batch, stack.p) == (cuda_work.COUNT, cuda_work.BATCH, cuda_work.P)
    assert {(hidden, 4 * hidden) for _, hidden in stack.layers} == {(cuda_work.UNITS, cuda_work.OUTPUTS)}


def test_floors_by_hand() -> None:
    """Zaremba large in TF32: 125 blocks of 12 units for all 24 rows, 525 of 1500 units kept, a streamed weight."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    (layer,) = (
        one for one in document["layers"]
        if (one["hidden"], one["precision"], one["skipping"]) == (1500, Precision.TF32.name, True)
    )  # fmt: skip
    assert [layer[name] for name in ("units", "rows", "parts", "slices", "resident")] == [12, 24, 125, 1, False]
    forward, backward = layer["forward"], layer["backward"]
    h, weight, share = 125 * 525 * 24 * 4, 525 * 6000 * 4, 125 * 525 * 24 * 4
    assert forward["flops"] == backward["flops"] == 2 * 20 * 525 * 6000
    assert (forward["l2"], backward["l2"]) == (h + weight, 2 * share + weight)
    # Multiply-adds of a block: 525 units are 9 chunks of 64, or 5 turns of 8 tiles of 16.
    slowest = max(h / 5.5e6, 9 * 64 * 48 * 24 / 1.1e6, 525 * 48 * 4 / 0.218e6)
    assert forward["floor"] == pytest.approx(max(1.2 + slowest, (h + weight) / 5.5e6), abs=1e-3)
    slowest = max(share / 5.5e6, 5 * 128 * 48 * 24 / 1.1e6, 525 * 48 * 4 / 0.218e6)
    expected = max(1.2 + slowest + share / 5.5e6, (2 * share + weight) / 5.5e6)
    assert backward["floor"] == pytest.approx(expected, abs=1e-3)
    # All gates' gradients, written once and read by every block.
    assert layer["broadcast"] == 126 * 6000 * 24 * 4
    # Inputs of the gates, y and operand, gates; cells for the rows that a slice is filled up with, too.
    assert forward["memory"] == 1500 * (20 * (16 + 4 + 4 + 16) + 24 * 4)
    assert backward["memory"] == 1500 * 20 * (16 + 4 + 4 + 16)


@pytest.mark.exhaustive
def test_a_document_that_is_out_of_date_is_told(program: Program, files: tuple[Path, Path]) -> None:
    file, document = files
    text = document.read_text(encoding="utf-8")
    document.write_text(text.replace("| 1.2 | unmeasured |", "| 1.1 | unmeasured |"), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    found["sources"]["gemm"], found["batches"] = "other", [1]
    file.write_text(json.dumps(found), encoding="utf-8")
    done = program("--check", "--json", file, "--into", document)
    assert done.returncode == 1
    assert done.stderr.endswith(f": run {cuda_resources.AGAIN}\n")
    for reason in (
        "gemm.cu has changed since",
        "the backend gives other batches",
        "the tables of kernels.md are not those of the file",
    ):
        assert reason in done.stderr


def test_wrong_use(program: Program, files: tuple[Path, Path]) -> None:
    file, document = files
    document.write_text("no marks", encoding="utf-8")
    done = program("--no-compile", "--json", file, "--into", document)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "cuda_resources.py: --into kernels.md: it has no <!-- table of what is measured: begin"
    )
    file.write_text("{}", encoding="utf-8")
    done = program("--check", "--json", file)
    assert (done.returncode, done.stderr) == (
        2, "cuda_resources.py: --json cuda_resources.json: not a file of this program\n"
    )  # fmt: skip


@pytest.mark.exhaustive
def test_registers_are_what_the_compiler_says() -> None:
    """Of some units; where the compiler is that of the file."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    try:
        cuda_resources.nvrtc()
        _, distribution = cuda_resources._distribution()
    except cuda_resources.CompileError as error:
        pytest.skip(str(error))
    if distribution.version != document["nvrtc"]["version"]:
        pytest.skip(f"NVRTC is {distribution.version}, the file's was {document['nvrtc']['version']}")
    for key in [*document["compiled"]][::8]:
        found, _ = cuda_resources.compile_unit(cuda_work.unit_of(key), 90)
        assert {name: list(needs) for name, needs in found.items()} == {
            name: needs["90"] for name, needs in document["compiled"][key].items()
        }
