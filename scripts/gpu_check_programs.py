"""``gpu_check.py``: whole programs, each in a process of its own: ``compute-sanitizer``, and the benchmark."""

import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check_cases import ODD_LAYERS, ODD_PRODUCTS, Layer, LayerRun, Product
from gpu_check_machine import PRECISIONS, PRODUCTS, RECURRENCE, Machine, Precision, environment
from gpu_check_processes import run
from gpu_check_report import Section

from sd_plugin import kernels
from sd_plugin.bench import results, summary
from sd_plugin.bench.columns import DEFAULT_PRECISIONS, DENSE, NR_RH_ST, STOCK

TOOLS = ("memcheck", "racecheck", "synccheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
_COUNT = re.compile(r"(\d+) (?:errors?|hazards? displayed)")
#: The paper's whole-step ratios of NR+RH+ST to stock.
TARGETS = {
    "zaremba-medium": 1.45,
    "zaremba-large": 1.64,
    "awd-lstm": 1.38,
    "opennmt-deen": 1.31,
    "opennmt-envi": 1.23,
    "ner": 1.39,
}


def _sanitized_calls(machine: Machine) -> Iterator[Callable[[], object]]:
    """Every kernel on odd and tiny shapes; first once each, then in the other ways and precisions."""
    torch.manual_seed(1)
    logits, target = torch.randn(33, 1025).to(machine.device), torch.arange(33).to(machine.device)

    def loss() -> None:
        _, lse = kernels.cross_entropy_forward(logits, target, -100, 0.1)
        kernels.cross_entropy_backward(logits, target, -100, 0.1, lse, torch.ones_like(lse))

    def products(precision: Precision, sizes: Product) -> None:
        count, batch, units, outputs, p = sizes
        shapes = (count, batch, units), (count, batch, outputs), (units, outputs)
        x, dy, weight = (torch.randn(shape).to(machine.device, precision.dtype) for shape in shapes)
        indices = torch.arange(max(1, round(units * (1 - p)))).int().expand(count, -1)
        kept = kernels.Kept(indices.to(machine.device), units)
        with precision.settings(), machine.ours(**{PRODUCTS: "skip"}):
            kernels.gemm_fp(x, weight, kept)
            kernels.gemm_bp(dy, weight, kept)
            kernels.gemm_wg(x, dy, kept)

    def layer(precision: Precision, sizes: Layer, way: str, variant: str) -> None:
        with precision.settings(), machine.ours(**{RECURRENCE: way}):
            LayerRun.of(machine, precision.dtype, sizes, variant, variant == "packed")()

    yield loss
    for sizes in ODD_PRODUCTS:
        for precision in PRECISIONS:
            yield partial(products, precision, sizes)
    for variant in ("kept", "packed", "padded", "random", "dense"):
        for way in ("persistent", "steps"):
            for precision in (PRECISIONS[1], PRECISIONS[2], PRECISIONS[0], PRECISIONS[3]):
                for layer_sizes in ODD_LAYERS:
                    yield partial(layer, precision, layer_sizes, way, variant)


@torch.no_grad()
def sanitize_child(machine: Machine, seconds: float) -> None:
    """As many calls as ``seconds`` allow; nothing is compared, so that few of torch's own kernels run."""
    end, calls = time.monotonic() + seconds, list(_sanitized_calls(machine))
    done = 0
    with machine.ours():
        for call in calls:
            if time.monotonic() > end:
                break
            call()
            done += 1
    machine.synchronize()
    print(f"calls: {done} of {len(calls)}", flush=True)


def sanitizer() -> str | None:
    """The program, if it is there."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitized(tool: str, program: str, script: Path, seconds: float) -> dict[str, Any]:
    """What one tool says of :func:`sanitize_child`."""
    command = [program, "--tool", tool, "--print-limit", "5", sys.executable, str(script), "--sanitize-child"]
    command += ["--seconds", f"{0.6 * seconds:.0f}"]  # the rest is for torch to start
    # Without the cache every tensor is an allocation of its own, past whose end memcheck can see.
    with environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"):
        try:
            status, told = run(command, seconds)
        except subprocess.TimeoutExpired:
            return {"skipped": f"not done within {seconds:.0f} s"}
    return judged(tool, status, told)


def judged(tool: str, status: int, told: str) -> dict[str, Any]:
    """The verdict of a finished tool from its exit status and what it printed."""
    found = _SUMMARY.findall(told)
    if not found:
        last = (told.strip().splitlines() or [""])[-1]
        return {"error": f"{tool} gave no summary (exit status {status}): {last[:200]}"}
    calls = re.findall(r"^calls: (.*)$", told, re.MULTILINE)
    count = max((int(number) for number in _COUNT.findall(found[-1])), default=-1)
    verdict: dict[str, Any] = {"passed": count == 0 and status == 0 and bool(calls), "errors": count}
    verdict |= {"summary": found[-1].strip(), "calls": calls[-1] if calls else "it ended early"}
    if not verdict["passed"]:
        lines = [line.removeprefix("=========").strip() for line in told.splitlines() if line.startswith("=========")]
        verdict["failed"] = [line for line in lines if line and "COMPUTE-SANITIZER" not in line][:12] or [
            f"exit {status}"
        ]
    return verdict


def check_sanitizer(section: Section, machine: Machine, script: Path) -> None:
    """Each tool, for its share of the time."""
    program = sanitizer()
    if program is None or not machine.is_gpu:
        section.part("compute-sanitizer", lambda: {"skipped": "it is not on PATH" if machine.is_gpu else "no GPU"})
        return
    for i, tool in enumerate(TOOLS):
        seconds = section.left() / (len(TOOLS) - i)
        section.part(tool, partial(sanitized, tool, program, script, seconds), at_least=15.0, limit=seconds)


def bench_command(
    machine: Machine, workloads: Sequence[str], precisions: Sequence[str], file: Path, seconds: float
) -> list[str]:
    """``sd-plugin bench`` for what is left to measure, with fewer repeats where there is less time."""
    command = [sys.executable, "-m", "sd_plugin", "bench", "--workload", ",".join(workloads), "--json", str(file)]
    if machine.tiny:
        options = ["--scale", "tiny", "--repeats", "1", "--warmup", "0", "--threads", "1"]
    else:
        share = seconds / len(workloads) / len(precisions)
        repeats = 40 if share > 20 else 20 if share > 8 else 10
        options = ["--device", "cuda", "--repeats", str(repeats), "--warmup", "3"]
    return [*command, *options, "--precision", ",".join(precisions), "--no-memory", "--no-phases", "--force"]


def measure_steps(
    machine: Machine, precisions: Sequence[str], section: Section
) -> tuple[results.Document | None, dict[str, Any]]:
    """Run the benchmark, again without a workload that ended it; what it wrote, and what went wrong where."""
    document: results.Document | None = None
    wrong: dict[str, Any] = {}
    wanted = ["awd-lstm", "ner"] if machine.tiny else list(TARGETS)
    with tempfile.TemporaryDirectory() as folder:
        while wanted:
            file, seconds = Path(folder, "bench.json"), section.left()
            file.unlink(missing_ok=True)
            if seconds < 5.0:
                wrong |= {name: {"skipped": "no time left"} for name in wanted}
                break
            told = ""
            try:
                # Not in a clone of the source, whose folders would hide what is installed.
                status, told = run(bench_command(machine, wanted, precisions, file, seconds), seconds, cwd=folder)
                reason = "" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                reason = "time"
            if file.exists():
                found = results.load(file)
                document = found if document is None else one_after_the_other(document, found)
                wanted = [name for name in wanted if name not in found["workloads"]]
            if not reason:
                break
            if reason == "time":
                wrong |= {name: {"skipped": f"not done within {seconds:.0f} s"} for name in wanted}
                break
            first, *wanted = wanted or ["bench"]
            last = (told.strip().splitlines() or [""])[-1]
            wrong[first] = {"error": f"{reason}: {last[:300]}"}
    return document, wrong


def one_after_the_other(first: results.Document, second: results.Document) -> results.Document:
    """Two runs over different workloads as one."""
    return {**first, "workloads": {**first["workloads"], **second["workloads"]}, "complete": second["complete"]}


def side_by_side(first: results.Document, second: results.Document) -> results.Document:
    """Two runs in different precisions as one."""
    workloads = dict(first["workloads"])
    for name, workload in second["workloads"].items():
        if name in workloads:
            others = {
                precision: {key: measured[key] for key in ("columns", "products", "fallbacks", "lost_hints")}
                for precision, measured in summary.in_precisions(second, workload).items()
            }
            workloads[name] = {**workloads[name], "precisions": others}
    precisions = [*summary.precisions(first), *summary.precisions(second)]
    return {**first, "workloads": workloads, "settings": {**first["settings"], "precisions": precisions}}


def condensed(document: results.Document) -> dict[str, Any]:
    """Medians and ratios by workload, precision and column."""
    told: dict[str, Any] = {}
    for name, workload in document["workloads"].items():
        told[name] = {}
        for precision, measured in summary.in_precisions(document, workload).items():
            columns = {}
            for column in measured["columns"]:
                found = summary.step(measured, column)
                assert found is not None
                columns[column] = {"ms": found.median, "iqr": found.iqr, "to_stock": summary.ratio(measured, column)}
            told[name][precision] = columns
    return told


def targets(steps: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The ratio of NR+RH+ST to stock in ``precision``, against the paper's."""
    told: dict[str, Any] = {}
    for name, target in TARGETS.items():
        measured = steps.get(name)
        columns = measured.get(precision, {}) if isinstance(measured, Mapping) else {}
        ratios = {column: columns.get(column, {}).get("to_stock") for column in (DENSE, NR_RH_ST)}
        if ratios[NR_RH_ST] is None:
            told[name] = {"target": target, "met": "not measured"}
            continue
        met = "yes" if ratios[NR_RH_ST] >= target else "no"
        told[name] = {"ratio": ratios[NR_RH_ST], "dense": ratios[DENSE], "target": target, "met": met}
        told[name]["stock_ms"] = columns[STOCK]["ms"]
    return told


def check_steps(section: Section, machine: Machine, bench_file: Path) -> None:
    """The benchmark and its tables, and the paper's ratios; the whole file of the benchmark beside ours."""
    kept: list[results.Document] = []

    def measure(precisions: Sequence[str]) -> dict[str, Any]:
        document, wrong = measure_steps(machine, precisions, section)
        told: dict[str, Any] = {}
        if document is not None:
            told = condensed(document)
            kept.append(side_by_side(kept[0], document) if kept else document)
            results.save(kept[-1], bench_file)
            print(summary.step_table(document).markdown(), flush=True)
        if bad := [f"{name}: {reason['error']}" for name, reason in wrong.items() if "error" in reason]:
            told["failed"] = bad
        if late := [name for name, reason in wrong.items() if "skipped" in reason]:
            told["not_measured"] = f"{', '.join(late)}: no time left"
        return told

    # Torch's own default first, by which the paper's ratios are judged.
    default, *others = DEFAULT_PRECISIONS["cpu" if machine.tiny else "cuda"]
    steps = section.part(f"medians, {default}", partial(measure, [default]), at_least=10.0, limit=math.inf)
    section.part("targets", partial(targets, steps, default), at_least=-math.inf)
    if others:
        section.part(f"medians, {', '.join(others)}", partial(measure, others), at_least=20.0, limit=math.inf)
    if kept:
        print("\n".join([*summary.head(kept[-1]), *summary.notes(kept[-1])]), flush=True)


def driver_version() -> str | None:
    """Of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
