"""What the documents say is what the project does."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sd_plugin import _tested

from .forks import Forks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_the_readme_runs_and_loses_no_hint(fork: Forks) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = fork("-c", [example], cwd=Path.cwd(), env=os.environ)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (lstm\S+) +1 +50.0% +50.0% +0 +(\d+)$", done.stdout, re.MULTILINE)
    assert dict(rows) == dict.fromkeys(("lstm.l0.recurrent", "lstm.l1.input", "lstm.l1.recurrent", "lstm.output"), "0")
    assert "slow path" not in done.stderr


def test_the_options_in_the_readme_are_those_of_the_code() -> None:
    source = (ROOT / "sd_plugin" / "opennmt" / "options.py").read_text(encoding="utf-8")
    options = re.findall(r'^    "(sd_\w+)": \{$', source, re.MULTILINE)
    assert len(options) == 4
    assert all(f"| `{name}` |" in README for name in options)


def test_the_table_of_results_is_what_the_logs_give() -> None:
    script = ROOT / "benchmarks" / "summarize_logs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_the_benchmark_is_what_its_samples_give() -> None:
    script, samples = ROOT / "benchmarks" / "table.py", ROOT / "benchmarks" / "results" / "cpu.json"
    command = [sys.executable, str(script), str(samples), "--only", "steps"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (table,) = re.findall(r"<!-- table of the benchmark: begin -->\n(.*?)<!-- table", README, re.DOTALL)
    assert table == done.stdout


@pytest.mark.exhaustive
def test_the_tables_of_the_kernels_are_what_the_code_gives() -> None:
    """No kernel has changed since it was compiled for them, and what the backend launches is what they say."""
    script = ROOT / "benchmarks" / "cuda_resources.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_document_of_the_kernels_names_what_there_is() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    folder = ROOT / "kernels" / "cuda"
    for name in set(re.findall(r"`(src/\w+\.cuh?|\w+\.json|\w+\.py)`", text)):
        assert any((place / name).is_file() for place in (folder, ROOT / "scripts")), name
    for name in set(re.findall(r"`((?:kernels|tests|benchmarks|scripts)/[\w./]+)`", text)):
        assert (ROOT / name).exists(), name
    code = "".join(path.read_text(encoding="utf-8") for path in (*folder.glob("*.py"), *(folder / "src").iterdir()))
    for name in set(re.findall(r"SD_PLUGIN_CUDA_\w+", text)):
        assert f'"{name}"' in code, name
    kernels = set(re.findall(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(", code))
    probes = {"noop", "barrier_counter", "barrier_flags", "gather_rows"}
    described = set(re.findall(r"`((?:gemm|lstm|cell|decoder|cross_entropy|kept|order|pack|keep)_\w+)`", text))
    assert kernels - probes == described & kernels


def test_one_wait_is_enough_for_both_rings() -> None:
    """What docs/kernels.md says of the ring of the weight, and the sources rely on."""
    from sd_plugin.kernels.cuda import tiling
    from sd_plugin.kernels.cuda.precision import Precision

    streamed = [tile for precision in Precision for tile in tiling.tiles(precision) if not tile.resident]
    assert streamed
    assert all(tile.w_stages >= tile.h_stages for tile in streamed)


def test_the_training_compared_in_the_readme_took_that_long() -> None:
    results = (ROOT / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    took = dict(re.findall(r"^\| \[multi30k_(\w+)\].* (\d+) \|$", results, re.MULTILINE))
    assert f"1,000 steps: {took['sd']}\nagainst {took['stock']} seconds" in README


def test_the_epoch_compared_in_the_readme_took_that_long() -> None:
    seconds = {}
    for mode in ("nr_rh_st", "random"):
        with (ROOT / "benchmarks" / "results" / "zaremba_medium" / f"{mode}.csv").open(encoding="utf-8") as file:
            seconds[mode] = round(float(next(csv.DictReader(file))["seconds"]))
    assert f"Penn Treebank: {seconds['nr_rh_st']} against {seconds['random']} seconds" in README


def test_the_documents_name_the_versions_of_torch_that_are_tested() -> None:
    oldest, newest = (f"{major}.{minor}" for major, minor in _tested.TORCH)
    assert f"on torch {oldest} to {newest}" in README
    tested = re.findall(
        r"torch (2\.\d+)\.\d+\s+and (2\.\d+)\.\d+", (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    )
    assert tested == [(oldest, newest)] * 2
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'dependencies = ["torch>={oldest}"]' in project


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "results" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"
