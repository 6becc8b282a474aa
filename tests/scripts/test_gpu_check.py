"""``gpu_check.py`` where there is no GPU: on the CPU, with other backends, and with parts that fail, hang and die."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Without it the script ends at once, and would end pytest.
pytest.importorskip("typer")
import gpu_check
import gpu_check_correct
import gpu_check_micro
import gpu_check_processes
import gpu_check_programs
import gpu_check_report
import torch
from gpu_check_machine import PRECISIONS, Machine, environment
from gpu_check_report import BROKEN, BrokenError, Section, failures, markdown, rounded, written
from hypothesis import given
from hypothesis import strategies as st

from sd_plugin import UsageError
from sd_plugin.bench import results
from sd_plugin.bench.columns import BF16, FP16, FP32, TF32
from sd_plugin.kernels import status

from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
BACKEND = "cpu" if status()["cpu"] is None else "reference"
MACHINE = Machine(torch.device("cpu"), BACKEND, tiny=True)


def program(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=environ)


# ---- the program ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = program(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check.py: torch finds no CUDA device here; this checks NVIDIA GPUs\n"
    assert list(tmp_path.iterdir()) == []


def test_without_typer_it_says_so_in_a_line(tmp_path: Path, without: Callable[..., dict[str, str]]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=without("typer"))
    assert done.returncode == 2
    assert done.stderr == "gpu_check.py needs sd-plugin and typer: pip install '.[bench]'\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "speed"], "--only 'speed' is not valid; valid: device, correctness, sanitizer, micro, steps"),
        (["--only", "micro,speed"], "--only 'speed' is not valid"),
        (["--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["--markdown", "nowhere/a.md"], "--markdown nowhere/a.md: there is no folder nowhere"),
        (["--seconds", "soon"], "--seconds"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu_check.run(["--rehearse", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_check.py: ") and told in line
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_not_replaced_unless_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    file.write_text("precious")
    assert gpu_check.run(["--rehearse", "--json", str(file)]) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err and file.read_text() == "precious"


@pytest.mark.exhaustive
def test_a_section_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    file, tables = tmp_path / "a.json", tmp_path / "a.md"
    done = program(
        "--rehearse", "--only", "device", "--seconds", 60, "--json", file, "--markdown", tables, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["complete"] and document["rehearsal"] and list(document["sections"]) == ["device"]
    assert set(document["sections"]["device"]["parts"]) == {"backend", "ceilings"}
    assert document["command"].endswith("--json a.json --markdown a.md")
    assert "device / ceilings" in done.stdout and "these are no results" in tables.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]


def fake_sections(found: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def run(name: str, *rest: object) -> dict[str, Any]:
        if isinstance(found[name], Exception):
            raise found[name]
        return found[name]

    return run


def test_a_section_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "device": {"backend": {"name": "x"}},
        "correctness": RuntimeError("it went wrong\nin many lines"),
        "sanitizer": {"memcheck": {"skipped": "it is not on PATH"}},
        "micro": {
            "launch": {"error": "no luck"},
            "host": {"a": 1.0},
            "stock nn.LSTM": {"small fp16": "RuntimeError: torch has none"},
            "our layer, auto, skipping": {"small fp16": {"forward": 1.5, "both": 4.5}},
        },
        "steps": {
            "targets": {"ner": {"target": 1.39, "met": "not measured"}},
            "medians, tf32": {"failed": ["ner: no"]},
        },
    }
    seen: list[list[str]] = []
    save = gpu_check.save

    def watched(document: Any, file: Path) -> None:
        save(document, file)
        on_disk = json.loads(file.read_text())
        seen.append(list(on_disk["sections"]))
        assert on_disk["complete"] == (len(seen) == 7)

    monkeypatch.setattr(gpu_check, "save", watched)
    monkeypatch.setattr(gpu_check, "run_section", fake_sections(found))
    file = tmp_path / "a.json"
    assert gpu_check.run(["--rehearse", "--json", str(file), "--markdown", str(tmp_path / "a.md")]) == 1
    names = list(gpu_check.SECTIONS)
    assert seen == [names[:n] for n in range(6)] + [names]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "gpu_check.py: failed: correctness; micro / launch; steps / medians, tf32"
    document = json.loads(file.read_text())
    assert document["sections"]["correctness"]["error"] == "RuntimeError: it went wrong"
    assert document["sections"]["micro"]["parts"] == found["micro"]
    text = (tmp_path / "a.md").read_text()
    assert "**Failed:** correctness; micro / launch" in text and "Skipped: sanitizer / memcheck" in text
    assert "| ner | - | - | 1.39 | not measured |" in text
    assert "| small fp16 | - | - | 1.5 | - | - | 4.5 |" in text


def test_sections_that_no_time_is_left_for_are_skipped_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares: dict[str, float] = {}

    def run(name: str, machine: Machine, seconds: float, *rest: object) -> dict[str, Any]:
        shares[name] = seconds
        monkeypatch.setattr(gpu_check, "LEAST", math.inf)  # the time is over
        return {}

    monkeypatch.setattr(gpu_check, "run_section", run)
    document = gpu_check.check(MACHINE, ["micro", "steps"], 100.0, tmp_path / "a.json", [])
    assert shares["micro"] == pytest.approx(100 * 0.23 / 0.53, rel=0.01)
    assert document["sections"]["steps"]["skipped"].endswith(" of 100 s left")
    assert "## steps: skipped" in capsys.readouterr().out
    assert failures(document) == []


def test_everything_runs_in_this_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Minutes of compiling would be no test of this program.
    monkeypatch.setattr(gpu_check_correct, "compiled", lambda machine: {"passed": True})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sections = ["device", "correctness", "sanitizer", "micro", "steps"]
        document = gpu_check.check(MACHINE, sections, 300.0, tmp_path / "a.json", [], isolated=False)
    finally:
        torch.set_num_threads(threads)
    assert failures(document) == [], capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text()) == document
    parts = {name: section["parts"] for name, section in document["sections"].items()}
    assert parts["device"]["backend"]["name"] == BACKEND
    names = [f"{kind}, {p.name}" for kind in ("layers", "products", "products, skip", "loss") for p in PRECISIONS]
    assert all(parts["correctness"][name]["cases"] > 0 for name in names if name not in ("loss, fp16", "loss, bf16"))
    assert BACKEND != "cpu" or parts["correctness"]["decoder, fp32"]["cases"] == 2
    assert parts["sanitizer"]["compute-sanitizer"] == {"skipped": "no GPU"}
    assert parts["micro"]["our layer, auto, skipping"]["tiny fp32"]["both"] > 0
    assert set(parts["micro"]["thresholds"]["suggested"]) == {p.name for p in PRECISIONS}
    choices = json.loads((ROOT / "kernels" / "cuda" / "choices.json").read_text())
    assert parts["micro"]["thresholds"]["choices"].keys() == choices.keys()
    fractions = parts["micro"]["thresholds"]["choices"]["largest_kept_fraction"]
    assert {phase: set(of) for phase, of in fractions.items()} == {
        phase: set(of) for phase, of in choices["largest_kept_fraction"].items()
    }
    assert parts["steps"]["targets"]["ner"]["target"] == 1.39
    assert parts["steps"]["targets"]["zaremba-large"] == {"target": 1.64, "met": "not measured"}
    assert set(results.load(tmp_path / "a_bench.json")["workloads"]) == {"awd-lstm", "ner"}
    text = markdown(document)
    assert "| layers, fp32 | 42 |" in text and "**LSTM layers**" in text and "| ner |" in text


def test_the_tiny_program_of_the_sanitizer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check_programs.sanitize_child(MACHINE, 60.0)
    done, _, of = capsys.readouterr().out.split()[1:]
    assert done == of and int(of) > 100
    gpu_check_programs.sanitize_child(MACHINE, 0.0)
    assert capsys.readouterr().out == f"calls: 0 of {of}\n"


def test_files_are_named_after_the_card() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce RTX 4090": "4090"}
    assert {name: gpu_check.slug(name) for name in names} == names


# ---- sections and processes -----------------------------------------------------------------------------------------


def fail(message: str) -> Any:
    raise ValueError(message)


def test_a_part_that_fails_leaves_the_others_alone() -> None:
    kept: list[dict[str, Any]] = []
    section = Section("s", 3600.0, lambda parts: kept.append(json.loads(json.dumps(parts))))
    section.part("bad", lambda: fail("no"))
    assert section.part("good", lambda: {"us": 1 / 3, "worst": float("nan"), "at": "see /a/b/c.cu"}) == {
        "us": 0.3333,
        "worst": "nan",
        "at": "see c.cu",
    }
    assert section.parts["bad"] == {"error": "ValueError: no"}
    assert [list(parts) for parts in kept] == [["bad"], ["bad"], ["bad", "good"], ["bad", "good"]]
    assert kept[0] == {"bad": {"running": True}}


def test_a_part_without_time_is_skipped_and_one_that_is_there_is_not_run_again() -> None:
    section = Section("s", 0.5, parts={"there": {"error": "it died"}})
    assert section.part("there", lambda: fail("again")) == {"error": "it died"}
    assert "no time left" in section.part("late", lambda: fail("run"), at_least=1.0)["skipped"]
    assert section.part("free", lambda: 1, at_least=-math.inf) == 1


@pytest.mark.parametrize("result", [ValueError("no"), {"failed": ["case: 1"]}])
def test_a_broken_device_ends_the_process_at_a_failure(result: Any) -> None:
    section = Section("s", 3600.0, is_broken=lambda: True)
    section.part("fine", lambda: 1)
    with pytest.raises(BrokenError):
        section.part("bad", lambda: fail("no") if isinstance(result, Exception) else result)


CHILD = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {scripts!r})
import gpu_check_report
gpu_check_report.GRACE = 0.3
from gpu_check_report import BROKEN, BrokenError, Section, save
file = Path({file!r})
parts = json.loads(file.read_text()) if file.exists() else {{}}
broken = []
def breaks():
    broken.append(1)
    raise RuntimeError("an illegal memory access")
section = Section("s", 3600.0, lambda parts: save(parts, file), parts, lambda: bool(broken), isolated=True)
try:
    section.part("first", lambda: 1)
    section.part("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    section.part("breaks", breaks)
    section.part("hangs", lambda: time.sleep(3600), limit=0.0)
    section.part("last", lambda: 2)
except BrokenError:
    sys.exit(BROKEN)
"""


def test_a_section_goes_on_after_parts_that_die_break_the_device_or_hang(tmp_path: Path) -> None:
    script, file = tmp_path / "child.py", tmp_path / "parts.json"
    script.write_text(CHILD.format(scripts=str(ROOT / "scripts"), file=str(file)))
    parts = gpu_check.supervise([sys.executable, str(script)], file, PATIENCE)
    assert parts == {
        "first": 1,
        "dies": {"error": "its process ended with status -11"},
        "breaks": {"error": "RuntimeError: an illegal memory access"},
        "hangs": {"error": "it did not end within 1 s"},
        "last": 2,
    }


@pytest.mark.parametrize(
    ("code", "told", "limit"),
    [
        ("raise SystemExit(1)", "its process ended with status 1", PATIENCE),
        (f"import time; time.sleep({2 * PATIENCE})", "not end in time", 1.0),
    ],
)
def test_a_section_whose_process_does_not_begin_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str, limit: float
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    start = time.monotonic()
    parts = gpu_check.supervise([sys.executable, "-S", "-c", code], tmp_path / "parts.json", limit)
    assert told in parts["process"]["error"] and time.monotonic() - start < PATIENCE


def test_a_program_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys; print('on', flush=True); subprocess.run([sys.executable, '-S', '-c', %r])"
    inner = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check_processes.run([sys.executable, "-S", "-c", code % inner], 1.0)
    assert gpu_check_processes.run([sys.executable, "-S", "-c", "print(1); raise SystemExit(4)"], PATIENCE) == (
        4,
        "1\n",
    )
    time.sleep(2.0)
    assert not (tmp_path / "alive").exists()


# ---- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(BACKEND != "cpu", reason="no compiler")
@pytest.mark.parametrize("name", ["gemm_wg", "lstm_backward", "cross_entropy_backward"])
def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from sd_plugin.kernels import cpu

    right = getattr(cpu.BACKEND, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        for tensor in result if isinstance(result, tuple) else [result]:
            if tensor is not None and tensor.numel():
                tensor.view(-1)[-1] += 0.1 * tensor.abs().max() + 1.0
        return result

    monkeypatch.setattr(cpu.BACKEND, name, wrong)
    cases = {
        "gemm_wg": gpu_check_correct.product_cases,
        "lstm_backward": gpu_check_correct.layer_cases,
        "cross_entropy_backward": gpu_check_correct.loss_cases,
    }[name]
    kind = "layer" if name.startswith("lstm") else "product"
    with MACHINE.ours():
        found = gpu_check_correct.judged(60.0, MACHINE, PRECISIONS[0], cases(MACHINE, PRECISIONS[0]), kind)
    assert not found["passed"] and found["failed"] and found["cases"] > 0


def test_what_is_not_a_number_is_an_infinite_error() -> None:
    right = torch.ones(3)
    assert gpu_check_correct.largest_error(torch.tensor([1.0, float("nan"), 1.0]), right) == math.inf
    assert gpu_check_correct.largest_error(torch.tensor([1.0, 1.5, 1.0]), right) == 0.5
    verdict = gpu_check_correct.Verdict(1e-3)
    verdict.compare("c", {"y": (torch.tensor([float("inf")]), torch.ones(1))})
    assert verdict.describe()["failed"] == ["c, y: inf"]


def test_a_backend_that_cannot_run_fails_and_one_that_cannot_do_a_type_says_so(tmp_path: Path) -> None:
    other = Machine(torch.device("cpu"), "cuda", tiny=True)
    if status()["cuda"] is None:
        pytest.skip("there is a GPU")
    section = Section("correctness", 60.0)
    gpu_check.check_device(section, other)
    assert "cuda cannot do lstm" in section.parts["backend"]["error"]
    with other.ours(), pytest.raises(Exception, match="cuda cannot do"):
        gpu_check_correct.judged(
            60.0, other, PRECISIONS[0], gpu_check_correct.layer_cases(other, PRECISIONS[0]), "layer"
        )
    if BACKEND == "cpu":
        with MACHINE.ours():
            cases = gpu_check_correct.loss_cases(MACHINE, PRECISIONS[2])
            found = gpu_check_correct.judged(60.0, MACHINE, PRECISIONS[2], cases, "product")
        assert found["passed"] and found["cases"] == 0 and "float16" in found["unsupported"][0]


def test_cases_stop_when_the_time_is_over() -> None:
    cases = gpu_check_correct.product_cases(MACHINE, PRECISIONS[0])
    found = gpu_check_correct.judged(-1.0, MACHINE, PRECISIONS[0], cases, "product")
    assert found["cases"] == 0 and found["not_run"] == 18


def test_thresholds_are_the_largest_fractions_at_which_skipping_wins() -> None:
    def times(*ours: float) -> dict[str, float]:
        return {"dense": 1.0, **dict(zip(("0.35", "0.5", "0.7", "0.9", "1"), ours, strict=True))}

    always, never, half = times(0.1, 0.2, 0.3, 0.4, 0.5), times(2, 2, 2, 2, 2), times(0.5, 0.9, 1.1, 1.2, 1.3)
    measured = {
        "fp32": {"a": {"FP": half, "BP": never, "WG": always}, "b": {"FP": half, "BP": never, "WG": half}},
        "tf32": {"error": "no"},
        "fp16": {"skipped": "no time left"},
        "bf16": {"a": {"FP": never, "BP": never, "WG": never}, "not_measured": "b"},
    }
    told = gpu_check_micro.thresholds(MACHINE, measured)
    # Of WG the mean of both shapes is faster even where one is not.
    assert told["suggested"] == {
        "fp32": {"FP": 0.5, "BP": 0.0, "WG": 1.0},
        "bf16": {"FP": 0.0, "BP": 0.0, "WG": 0.0},
    }
    assert told["by_shape"]["fp32"]["b"] == {"FP": 0.5, "BP": 0.0, "WG": 0.5}
    assert told["choices"]["largest_kept_fraction"]["wg"] == {"STRICT": 1.0, "BF16": 0.0}
    assert "skipped" in gpu_check_micro.thresholds(MACHINE, {"fp32": {"error": "no"}})


RACES = """========= COMPUTE-SANITIZER
calls: 9 of 12
========= Error: Race reported between Write access
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_what_the_sanitizers_say_is_understood() -> None:
    fine = "========= COMPUTE-SANITIZER\ncalls: 12 of 12\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check_programs.judged("memcheck", 0, fine) == {
        "passed": True,
        "errors": 0,
        "summary": "0 errors",
        "calls": "12 of 12",
    }
    races = gpu_check_programs.judged("racecheck", 0, RACES)
    assert (races["passed"], races["errors"], races["calls"]) == (False, 2, "9 of 12")
    assert races["failed"][0] == "Error: Race reported between Write access"
    clean = "calls: 3 of 3\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_check_programs.judged("racecheck", 0, clean)["passed"]
    early = gpu_check_programs.judged("memcheck", 1, "boom\n========= ERROR SUMMARY: 0 errors\n")
    assert not early["passed"] and early["calls"] == "it ended early"
    assert "no summary" in gpu_check_programs.judged("memcheck", 1, "cannot start\n")["error"]


def steps_of(precisions: list[str], workloads: list[str]) -> results.Document:
    def run(ms: float) -> dict[str, Any]:
        columns = {"stock": {"step_ms": [ms], "loss": [1.0]}, "nr_rh_st": {"step_ms": [ms / 2], "loss": [1.0]}}
        return {"columns": columns, "products": [], "fallbacks": [], "lost_hints": {}}

    made = {}
    for name in workloads:
        others = {precision: run(float(i + 2)) for i, precision in enumerate(precisions[1:])}
        made[name] = {"title": name, "note": "", **run(1.0), **({"precisions": others} if others else {})}
    settings = {"precisions": precisions, "device": "cuda", "columns": ["stock", "nr_rh_st"]}
    return {"kind": results.KIND, "schema": results.SCHEMA, "settings": settings, "workloads": made, "complete": True}


def test_the_benchmark_goes_on_after_a_workload_that_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: list[str], seconds: float, **options: Any) -> tuple[int, str]:
        names, file = command[command.index("--workload") + 1], Path(command[command.index("--json") + 1])
        asked.append(names)
        done = [name for name in names.split(",") if name != "awd-lstm"]
        done = names.split(",")[: names.split(",").index("awd-lstm")] if "awd-lstm" in names else done
        results.save(steps_of([TF32], done), file)
        return (1, "Traceback\nCUDA error: no\n") if "awd-lstm" in names else (0, "")

    monkeypatch.setattr(gpu_check_programs, "run", run)
    machine = Machine(torch.device("cpu"), "reference")
    document, wrong = gpu_check_programs.measure_steps(machine, [TF32], Section("steps", 100.0))
    assert asked == [
        "zaremba-medium,zaremba-large,awd-lstm,opennmt-deen,opennmt-envi,ner",
        "opennmt-deen,opennmt-envi,ner",
    ]
    assert document is not None and "awd-lstm" not in document["workloads"] and len(document["workloads"]) == 5
    assert wrong == {"awd-lstm": {"error": "exit status 1: CUDA error: no"}}
    told = gpu_check_programs.targets(gpu_check_programs.condensed(document), TF32)
    assert told["ner"] == {"ratio": 2.0, "dense": None, "target": 1.39, "met": "yes", "stock_ms": 1.0}
    assert told["awd-lstm"]["met"] == "not measured"


def test_a_benchmark_that_takes_too_long_keeps_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], seconds: float, **options: Any) -> tuple[int, str]:
        results.save(steps_of([TF32], ["zaremba-medium"]), Path(command[command.index("--json") + 1]))
        raise subprocess.TimeoutExpired(command, seconds)

    monkeypatch.setattr(gpu_check_programs, "run", run)
    machine = Machine(torch.device("cpu"), "reference")
    document, wrong = gpu_check_programs.measure_steps(machine, [TF32], Section("steps", 100.0))
    assert document is not None and list(document["workloads"]) == ["zaremba-medium"]
    assert len(wrong) == 5 and all("not done within" in reason["skipped"] for reason in wrong.values())


def test_runs_in_other_precisions_are_put_beside_the_first() -> None:
    both = gpu_check_programs.side_by_side(steps_of([TF32], ["ner", "awd-lstm"]), steps_of([FP32, FP16], ["ner"]))
    assert both["settings"]["precisions"] == [TF32, FP32, FP16]
    told = gpu_check_programs.condensed(both)
    assert list(told["ner"]) == [TF32, FP32, FP16] and list(told["awd-lstm"]) == [TF32]
    assert told["ner"][FP16]["stock"]["ms"] == 2.0 and told["ner"][TF32]["nr_rh_st"]["to_stock"] == 2.0


def test_the_command_of_the_benchmark_fits_the_time() -> None:
    machine = Machine(torch.device("cpu"), "reference")
    for seconds, repeats in ((300.0, "40"), (30.0, "20"), (10.0, "10")):
        command = gpu_check_programs.bench_command(machine, ["ner", "awd-lstm"], [BF16], Path("f"), seconds)
        assert command[command.index("--repeats") + 1] == repeats
        assert command[command.index("--precision") + 1] == "bf16"


# ---- the file -------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_written_is_json(value: Any) -> None:
    assert json.loads(written(value)) == value


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1e6) | st.lists(st.floats(0, 1e6)), max_size=40))
def test_lines_are_short_and_numbers_too(value: dict[str, Any]) -> None:
    lines = written(rounded(value)).splitlines()
    assert all(len(line) <= 120 for line in lines if line.count(": ") > 1)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    gpu_check_report.save({"a": 1}, file)
    with pytest.raises(ValueError, match="JSON compliant"):
        gpu_check_report.save({"a": math.nan}, file)
    assert json.loads(file.read_text()) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_environment_is_as_before() -> None:
    os.environ.pop("SD_PLUGIN_TEST_A", None)
    with environment(SD_PLUGIN_TEST_A="1"):
        assert os.environ["SD_PLUGIN_TEST_A"] == "1"
    assert "SD_PLUGIN_TEST_A" not in os.environ


def test_exit_status_of_a_broken_section_is_no_other_one() -> None:
    assert BROKEN not in (0, 1, 2)
    assert gpu_check.INTERRUPTED == 130


def test_an_interruption_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run_section", interrupted)
    assert gpu_check.run(["--rehearse", "--json", str(tmp_path / "a.json")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("gpu_check.py: interrupted")
    assert not json.loads((tmp_path / "a.json").read_text())["complete"]


def test_a_wrong_section_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'x'"):
        gpu_check._chosen(["device", "x"])
    assert gpu_check._chosen(["steps,device"]) == ["device", "steps"]
    assert gpu_check._chosen(None) == list(gpu_check.SECTIONS)
