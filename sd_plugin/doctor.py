"""The sub-command ``sd-plugin doctor``: what the plugin finds on this machine, and what it would do here.

It looks at hosts without importing them, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from . import __version__, _autoload
from ._environment import (
    CASE_VARIABLE,
    CASES,
    MODES,
    RECURRENT_VARIABLE,
    TARGETS,
    TARGETS_VARIABLE,
    VARIABLE,
    Switch,
    read_case,
    read_recurrent_dropout,
    read_switch,
)
from ._tested import untested_torch
from .patches import Finding, Host, registry

#: Environment variable -> what it does.
VARIABLES = {
    VARIABLE: f"0: off; not set: only adds names to OpenNMT-py; 1 or a mode ({', '.join(MODES)}): patches the hosts",
    TARGETS_VARIABLE: f"which hosts {VARIABLE} speaks of, of {', '.join(TARGETS)}; not set: all but torch",
    CASE_VARIABLE: f"how units are dropped, of {', '.join(CASES)} (Fig. 1 of the paper); not set: III",
    RECURRENT_VARIABLE: "recurrent dropout for targets torch and targer; not set: that of the dropout around the LSTM",
    "SD_PLUGIN_BACKEND": "auto (default), or forces a backend",
    "SD_PLUGIN_REPORT": "1: counters of what was dropped and skipped, when a program ends",
    "SD_PLUGIN_CUDA_RECURRENCE": "persistent or steps: how an LSTM layer runs on a GPU; not set: whichever fits",
    "SD_PLUGIN_CUDA_PRODUCTS": "skip or dense: how products run on a GPU; not set: what should be faster",
    "SD_PLUGIN_CXX": "the compiler of the CPU backend; not set: CXX, g++ or c++",
    "SD_PLUGIN_CPU_ISA": "avx512, avx2 or portable, instead of the most the machine has",
    "SD_PLUGIN_CACHE": "where compiled libraries and cloned hosts are kept; not set: in XDG_CACHE_HOME or ~/.cache",
    "AWD_LSTM_DIR": "a checkout of salesforce/awd-lstm-lm",
    "TARGER_DIR": "a checkout of achernodub/targer",
}
_CUPY = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def main(argv: Sequence[str]) -> int:
    """Print what is found; 0."""
    parser = argparse.ArgumentParser(
        prog="sd-plugin doctor",
        description="List hosts, backends and settings: what is there, whether it is patched or used, and why not.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(list(argv))
    found = examine(os.environ)
    try:
        print(json.dumps(found, indent=2) if options.json else render(found), flush=True)
    except BrokenPipeError:
        # Whoever reads it (`| head`) has seen enough; the interpreter must not flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def examine(environ: Mapping[str, str]) -> dict[str, Any]:
    """Everything the command tells, as plain data."""
    switch = read_switch(environ)
    return {
        "versions": _versions(),
        "untested": _untested(),
        "hook": _hook(),
        "hosts": [_host(host, environ, switch) for host in registry().values()],
        "backends": _backends(),
        "devices": _devices(),
        "environment": [_variable(name, environ) for name in VARIABLES],
    }


def _versions() -> dict[str, str | None]:
    import torch

    cupy = next((f"{name} {version}" for name in _CUPY if (version := _installed(name)) is not None), None)
    return {
        "sd-plugin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "cupy": cupy,
    }


def _untested() -> str | None:
    import torch

    return untested_torch(torch.__version__)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _hook() -> dict[str, Any]:
    """Whether a program started in this environment gets the plugin by itself."""
    if _autoload.is_installed():
        return {"installed": True, "why": "installed by the start-up file"}
    if read_switch(os.environ).enabled:
        return {"installed": False, "why": "start-up files are not read here: use `python -m sd_plugin PROGRAM`"}
    return {"installed": False, "why": f"{VARIABLE} switches it off"}


def _host(host: Host, environ: Mapping[str, str], switch: Switch) -> dict[str, Any]:
    found = []
    for finding in host.find(environ):
        patched, why = _verdict(host, finding, environ, switch)
        found.append({"where": finding.where, "version": finding.version, "patched": patched, "why": why})
    return {
        "name": host.name,
        "title": host.title,
        "supported": host.supported,
        "located": host.located,
        "modules": list(host.modules),
        "found": found,
    }


def _verdict(host: Host, finding: Finding, environ: Mapping[str, str], switch: Switch) -> tuple[bool, str]:
    """Whether a program that is started in this environment and imports the host has it patched, and why."""
    if finding.problem is not None:
        return False, finding.problem
    if not switch.enabled:
        return False, f"{VARIABLE} switches everything off"
    additive = f"sd_plugin.patches.{host.name}" in _autoload.ADDITIVE
    names = " (only new names are added to it)" if additive else ""
    if not switch.replace:
        return False, f"{VARIABLE} is not set{names}"
    if host.target not in switch.targets:
        return False, f"{host.target} is not in {TARGETS_VARIABLE}{names}"
    problem = None if additive else _problem(environ)
    if problem is not None:
        return False, problem
    refused = host.refuses(switch.mode or "nr_rh_st", read_case(environ), read_recurrent_dropout(environ))
    if refused is not None:
        return False, refused
    if not _autoload.is_installed():
        return False, _hook()["why"]
    return True, f"mode {switch.mode or 'nr_rh_st'}"


def _backends() -> list[dict[str, Any]]:
    from . import kernels

    return [
        {"name": name, "available": reason is None, "why": reason, "built": _built(name) if reason is None else {}}
        for name, reason in kernels.status().items()
    ]


def _built(backend: str) -> dict[str, str]:
    """How a backend was compiled, where it is."""
    if backend != "cpu":
        return {}
    from .kernels.cpu import build

    return build.describe()


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _variable(name: str, environ: Mapping[str, str]) -> dict[str, str | None]:
    value = environ.get(name)
    problem = read_switch({name: value or ""}).problem or _problem({name: value or ""})
    return {"name": name, "value": value, "meaning": VARIABLES[name], "problem": problem}


def _problem(environ: Mapping[str, str]) -> str | None:
    """What is wrong with a setting that patches read, in words."""
    for read in (read_case, read_recurrent_dropout):
        try:
            read(environ)
        except ValueError as error:
            return str(error)
    return None


def render(found: Mapping[str, Any]) -> str:
    """The same for people."""
    versions = ", ".join(f"{name} {value or 'none'}" for name, value in found["versions"].items())
    hook = found["hook"]
    lines = [
        versions,
        *([found["untested"]] if found["untested"] else []),
        f"start-up hook: {'active' if hook['installed'] else 'not active'}, {hook['why']}",
        "",
        "hosts",
    ]
    for host in found["hosts"]:
        lines.append(f"  {host['title']} ({host['name']}); supported: {host['supported']}")
        if not host["found"]:
            lines.append(f"    not found ({host['located']})")
        for finding in host["found"]:
            verdict = "patched" if finding["patched"] else "not patched"
            lines.append(f"    {finding['version']} in {finding['where']}")
            lines.append(f"      {verdict}: {finding['why']}")
    lines += ["", "backends, by preference"]
    for backend in found["backends"]:
        built = ", ".join(f"{name} {value}" for name, value in backend["built"].items() if value)
        state = f"available{': ' if built else ''}{built}" if backend["available"] else f"unavailable: {backend['why']}"
        lines.append(f"  {backend['name']:<10} {state}")
    lines.append(f"  GPUs: {', '.join(found['devices']) or 'none that torch can use'}")
    lines += ["", "environment variables"]
    for variable in found["environment"]:
        value = "not set" if variable["value"] is None else f"= {variable['value']}"
        lines.append(f"  {variable['name']} {value}")
        lines.append(f"      {variable['meaning']}")
        if variable["problem"]:
            lines.append(f"      problem: {variable['problem']}")
    return "\n".join(lines)
