"""Peak memory of one column, measured in a process of its own: ``python -c "…memory import main…" REQUEST``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import precision
from .workload import Setup

#: Training steps before the peak is read: the optimizer's state exists after the first.
STEPS = 3
_PROGRAM = "import sys; from sd_plugin.bench.memory import main; sys.exit(main(sys.argv[1]))"


def measure(workload: str, column: str, setup: Setup, threads: int) -> dict[str, Any]:
    """Run a few steps of one column in a fresh process.

    Returns:
        For the JSON file, in MiB: ``peak`` of the process (or of the device's allocator), ``before`` the model was
        made, and ``increase``; or ``error``, a line, where the process failed.
    """
    request = {
        "workload": workload,
        "column": column,
        "threads": threads,
        "device": str(setup.device),
        "seed": setup.seed,
        "tiny": setup.tiny,
        "precision": setup.precision,
        "hosts": {name: str(folder) for name, folder in setup.hosts.items()},
    }
    # Not in the working directory: in a clone of the source, its folder would hide the installed package.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PROGRAM, json.dumps(request)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1].partition(":")[0]
        return {"error": f"exit status {done.returncode} {last}".strip()}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main(request: str) -> int:
    """The process that is measured; prints the result as a line of JSON."""
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    device = torch.device(asked["device"])
    hosts = {name: Path(folder) for name, folder in asked["hosts"].items()}
    setup = Setup(device, asked["seed"], asked["tiny"], hosts=hosts, precision=asked["precision"])
    with precision.settings(setup.precision):
        peak, before = _measured(asked["workload"], asked["column"], setup)
    print(json.dumps({"peak": round(peak, 1), "before": round(before, 1), "increase": round(peak - before, 1)}))
    return 0


def _measured(workload: str, column: str, setup: Setup) -> tuple[float, float]:
    """The peak in MiB, and that before the model was made."""
    from .registry import WORKLOADS

    build = WORKLOADS[workload].build
    # What is loaded at first use is not the model's: the host, the backend, torch's own libraries.
    build(column, replace(setup, tiny=True)).step()
    before = _peak(setup.device)
    training = build(column, setup)
    for _ in range(STEPS):
        training.step()
    return _peak(setup.device), before


def _peak(device: torch.device) -> float:
    """The most memory used so far, MiB: resident of this process, or allocated on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) / 2**20
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10
