#!/usr/bin/env python
"""Check and measure the CUDA backend on the NVIDIA GPU of this machine, in one command of eight minutes.

    python scripts/gpu_check.py [--json FILE] [--markdown FILE] [--seconds 480] [--only SECTION ...]

| section | what |
|---|---|
| device | versions, bandwidth, throughput of torch's matrix products |
| correctness | kernels against float64 in every precision; CUDA graphs, streams, torch.compile; the kernels' tests |
| sanitizer | compute-sanitizer, where it is on PATH |
| micro | launches, barriers, bandwidth of gathered rows, LSTM layers, products: stock and ours |
| steps | sd-plugin bench on every workload, and the paper's ratios |

Nothing is installed. Every section runs in a process of its own, so that a kernel that breaks the device or never ends
takes one part of a section with it; the section then goes on with its next part in a new process. The file is written
after each section and holds what there is. Sections that no time is left for are skipped and say so.

Exit status: 0 all well, 1 something failed (the last line names it), 2 wrong use or no GPU.
"""

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

try:
    import typer

    import sd_plugin  # noqa: F401
except ImportError:
    print("gpu_check.py needs sd-plugin and typer: pip install '.[bench]'", file=sys.stderr)
    raise SystemExit(2) from None

import gpu_check_correct
import gpu_check_micro
import gpu_check_processes
import gpu_check_programs
import torch
from gpu_check_machine import Machine
from gpu_check_report import (
    BROKEN,
    GRACE,
    KIND,
    SCHEMA,
    BrokenError,
    Section,
    failures,
    markdown,
    one_line,
    rounded,
    save,
)
from thread_limits import bound_torch
from typer.main import get_command

from sd_plugin import UsageError, kernels
from sd_plugin.bench import machine as bench_machine
from sd_plugin.bench import results
from sd_plugin.bench.folders import without_folders

SCRIPT = Path(__file__).resolve()
#: Section -> its share of the time; what one leaves over goes to those after it.
SECTIONS = {"device": 0.04, "correctness": 0.25, "sanitizer": 0.18, "micro": 0.23, "steps": 0.30}
#: Seconds below which a section is not begun: starting a process and the device takes some.
LEAST = 10.0
#: Seconds that a section's process takes to begin.
START = 5.0
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def check_device(section: Section, machine: Machine) -> None:
    """What everything else must be read with."""

    def backend() -> dict[str, Any]:
        with machine.ours():
            kernels.choose("lstm", machine.device, torch.float32)
            return {**bench_machine.backend(machine.device), "others": kernels.status()}

    section.part("backend", backend)
    section.part("ceilings", lambda: gpu_check_micro.ceilings(machine))


def measure(section: Section, machine: Machine, bench_file: Path) -> None:
    """All parts of a section."""
    parts: dict[str, Callable[[], None]] = {
        "device": lambda: check_device(section, machine),
        "correctness": lambda: gpu_check_correct.check(section, machine),
        "sanitizer": lambda: gpu_check_programs.check_sanitizer(section, machine, SCRIPT),
        "micro": lambda: gpu_check_micro.check(section, machine),
        "steps": lambda: gpu_check_programs.check_steps(section, machine, bench_file),
    }
    parts[section.name]()


def child(name: str, machine: Machine, seconds: float, file: Path, bench_file: Path) -> int:
    """A section's process: goes on where the last one ended, and keeps its parts in ``file``."""
    keep = lambda parts: save(parts, file)  # noqa: E731
    found = gpu_check_processes.read(file)
    section = Section(name, seconds, keep, found, machine.is_broken, isolated=True)
    try:
        measure(section, machine, bench_file)
    except BrokenError:
        return BROKEN
    return 0


def supervise(command: list[str], file: Path, seconds: float) -> dict[str, Any]:
    """Run a section's process, and a new one for the rest as long as each measures something; all its parts.

    Args:
        command: of the process; the seconds it may take are added.
        file: where it keeps its parts.
    """
    end, before, parts = time.monotonic() + seconds, -1, {}
    while (left := end - time.monotonic()) > 0 and len(parts) > before:
        before = len(parts)
        process = subprocess.Popen([*command, "--seconds", f"{max(1.0, left - START):.1f}"], start_new_session=True)
        try:
            status = gpu_check_processes.wait(process, left + 2 * GRACE)
        except subprocess.TimeoutExpired:
            status = None
        parts = gpu_check_processes.read(file)
        ended = "it did not end in time" if status is None else f"its process ended with status {status}"
        unfinished = [name for name, part in parts.items() if isinstance(part, dict) and part.get("running")]
        parts |= {name: {"error": ended} for name in unfinished}
        if status == 0:
            break
        if not unfinished and status != BROKEN:
            # Between parts, such as at its start: another would end there too.
            parts["process"] = {"error": ended}
            break
        save(parts, file)
    return parts


def run_section(name: str, machine: Machine, seconds: float, isolated: bool, bench_file: Path) -> dict[str, Any]:
    """A section's parts, measured in its own process or in this one."""
    if not isolated:
        section = Section(name, seconds, is_broken=machine.is_broken)
        measure(section, machine, bench_file)
        return section.parts
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "parts.json")
        command = [sys.executable, str(SCRIPT), "--child", name, "--json", str(file), "--bench-json", str(bench_file)]
        command += ["--rehearse"] if machine.tiny else []
        return supervise(command, file, seconds)


def head(machine: Machine, seconds: float, command: list[str]) -> dict[str, Any]:
    """The file before anything is measured."""
    try:
        import cupy
    except Exception:  # one for another CUDA fails in many ways
        cupy = None
    about = bench_machine.machine(machine.device)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "rehearsal": machine.tiny,
        "complete": False,
        "date": bench_machine.now(),
        "command": " ".join(["gpu_check.py", *map(without_folders, command)]),
        "seconds": seconds,
        "machine": {**about, "driver": gpu_check_programs.driver_version() if machine.is_gpu else None},
        "versions": {**bench_machine.versions(), "cupy": getattr(cupy, "__version__", None)},
        "git": bench_machine.git(),
        "sections": {},
    }


def check(
    machine: Machine, sections: list[str], seconds: float, file: Path, command: list[str], isolated: bool = True
) -> dict[str, Any]:
    """Run ``sections``, writing ``file`` after each; everything that was found."""
    document = rounded(head(machine, seconds, command))
    bench_file = file.with_name(f"{file.stem}_bench.json")
    end = time.monotonic() + seconds
    save(document, file)
    for i, name in enumerate(sections):
        left = end - time.monotonic()
        share = left * SECTIONS[name] / sum(SECTIONS[rest] for rest in sections[i:])
        if left < LEAST:
            document["sections"][name] = {"skipped": f"{max(0.0, left):.0f} of {seconds:g} s left"}
            print(f"## {name}: skipped, {document['sections'][name]['skipped']}", flush=True)
            save(document, file)
            continue
        print(f"## {name}: up to {share:.0f} s", flush=True)
        start = time.monotonic()
        try:
            found: dict[str, Any] = {"parts": run_section(name, machine, share, isolated, bench_file)}
        except Exception as error:  # the other sections are worth having
            found = {"error": one_line(error)}
            print(f"{name}: {found['error']}", file=sys.stderr, flush=True)
        document["sections"][name] = {"seconds": rounded(time.monotonic() - start), **found}
        save(document, file)
    document["complete"] = True
    save(document, file)
    return document


def slug(name: str) -> str:
    """A GPU's name for a file: of ``NVIDIA H100 80GB HBM3`` the ``h100``."""
    words = name.lower().replace("-", " ").split()
    return next((word for word in words if any(c.isdigit() for c in word)), "gpu")


def _chosen(only: list[str] | None) -> list[str]:
    asked = [name.strip() for text in only or [] for name in text.split(",")]
    for name in asked:
        if name not in SECTIONS:
            raise UsageError(f"--only {name!r} is not valid; valid: {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in asked] if asked else list(SECTIONS)


def _machine(rehearse: bool) -> Machine:
    if rehearse:
        return Machine.rehearsal()
    if not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here; this checks NVIDIA GPUs")
    return Machine.gpu()


@app.command()
def main(
    context: typer.Context,
    json: Annotated[Path | None, typer.Option(help="Default: gpu_check_CARD.json, here.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Tables of it, for a document.")] = None,
    seconds: Annotated[float, typer.Option(help="For everything; sections get shares of it.")] = 480.0,
    only: Annotated[list[str] | None, typer.Option(help=f"Sections: of {', '.join(SECTIONS)}; others: none.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --json if it exists.")] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", hidden=True)] = False,
    child_of: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
    bench_json: Annotated[Path | None, typer.Option(hidden=True)] = None,
    sanitize: Annotated[bool, typer.Option("--sanitize-child", hidden=True)] = False,
) -> None:
    """Check and measure the CUDA backend on this machine's NVIDIA GPU."""
    sections, machine = _chosen(only), _machine(rehearse)
    if (note := bound_torch()) and child_of is None:
        print(f"gpu_check.py: {note}", file=sys.stderr)
    if sanitize:
        gpu_check_programs.sanitize_child(machine, seconds)
        return
    if child_of is not None and json is not None and bench_json is not None:
        raise typer.Exit(child(child_of, machine, seconds, json, bench_json))
    card = slug(torch.cuda.get_device_name(machine.device)) if machine.is_gpu else platform.machine()
    file = json or Path(f"gpu_check_{card}.json")
    results.check_target(file, force)
    if markdown_file is not None and not markdown_file.resolve().parent.is_dir():
        raise UsageError(f"--markdown {markdown_file}: there is no folder {markdown_file.parent}")
    try:
        document = check(machine, sections, seconds, file.resolve(), context.obj or [])
    except KeyboardInterrupt:
        print(f"gpu_check.py: interrupted; the finished sections are in {file}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if markdown_file is not None:
        markdown_file.write_text(markdown(document), encoding="utf-8")
    print(f"\n{markdown(document)}\nwritten: {file}")
    if wrong := failures(document):
        print(f"gpu_check.py: failed: {'; '.join(wrong)}", file=sys.stderr)
        raise typer.Exit(1)


def run(argv: list[str]) -> int:
    """The program with ``argv``; its exit status."""
    try:
        status = get_command(app).main(args=argv, prog_name="gpu_check.py", standalone_mode=False, obj=argv)
    except UsageError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        # typer's own complaints, whichever class its version gives them.
        if not hasattr(error, "format_message"):
            raise
        print(f"gpu_check.py: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
