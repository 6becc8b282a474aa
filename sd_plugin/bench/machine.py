"""Where and with what a benchmark ran. Nothing here names a folder, a user or a host of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__, kernels
from . import opennmt_host
from .folders import without_folders


def _field(path: str, name: str) -> str | None:
    """The value of the first line ``name: value`` of a file of ``/proc``."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _huge_pages() -> str | None:
    """The kernel's mode of transparent huge pages."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return None
    return modes.partition("[")[2].partition("]")[0] or None


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory and device."""
    memory = _field("/proc/meminfo", "MemTotal")
    found: dict[str, Any] = {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        # Stock allocates large results anew, which costs less where torch may use huge pages for them.
        "huge_pages": _huge_pages(),
        "torch_huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        # cuDNN's LSTM uses the first, torch.mm the second.
        found["tf32"] = {"cudnn": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
    return found


def versions() -> dict[str, Any]:
    """Of everything that is timed; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sd-plugin": __version__,
        "OpenNMT-py": opennmt_host.version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def backend(device: torch.device) -> dict[str, Any]:
    """The backend that calls go to, and how it was built where it tells (its ``describe``).

    Raises:
        BackendError: ``SD_PLUGIN_BACKEND`` forces one that cannot run here.
    """
    chosen = kernels.choose("lstm", device, torch.float32, counted=False)
    told = {name: without_folders(value) for name, value in chosen.describe().items()}
    return {"name": chosen.name, "build": told}


def git() -> dict[str, Any] | None:
    """Commit of the checkout that this package is run from; None where it is not run from one."""
    root = Path(__file__).resolve().parents[2]

    def ask(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = ask("rev-parse", "--show-toplevel")
    # An installed package may lie inside some other repository.
    if top is None or Path(top).resolve() != root:
        return None
    return {"commit": ask("rev-parse", "HEAD"), "dirty": ask("status", "--porcelain") != ""}


def command(arguments: Sequence[str]) -> str:
    """The command line, without the folders of the machine."""
    return " ".join(["sd-plugin bench", *(without_folders(argument) for argument in arguments)])


def now() -> str:
    """The date and time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
