"""The sub-command ``sd-plugin doctor``: what the plugin finds on this machine, and what it would do here.

It looks at hosts without importing them, and changes nothing; the CPU kernels are compiled if they were not. The exit
status is 1 if an environment variable has a value that is not understood or cannot be used here.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from . import __version__, _autoload
from ._environment import (
    CASE_VARIABLE,
    CASES,
    CHECK_VARIABLE,
    MODES,
    RECURRENT_VARIABLE,
    REPORT_VARIABLE,
    SKIP_FROM_VARIABLE,
    TARGETS,
    TARGETS_VARIABLE,
    VARIABLE,
    Switch,
    read_case,
    read_check,
    read_recurrent_dropout,
    read_report,
    read_skip_from,
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
    REPORT_VARIABLE: "1: counters of what was dropped and skipped, when a program ends",
    CHECK_VARIABLE: "1: compares what is skipped with the data, to find writes that torch does not count; slow",
    SKIP_FROM_VARIABLE: "multiply-adds from which linear layers and a decoder's steps skip; not set: what was measured",
    "SD_PLUGIN_CUDA_RECURRENCE": "persistent or steps: how an LSTM layer runs on a GPU; not set: whichever fits",
    "SD_PLUGIN_CUDA_PRODUCTS": "skip or dense: how products run on a GPU; not set: what should be faster",
    "SD_PLUGIN_CXX": "the compiler of the CPU backend; not set: CXX, g++ or c++",
    "SD_PLUGIN_CPU_ISA": "avx512, avx2 or portable, instead of the most the machine has",
    "SD_PLUGIN_CPU_SANITIZE": "the CPU kernels with a sanitizer, for tests",
    "SD_PLUGIN_CACHE": "where compiled libraries and cloned hosts are kept; not set: in XDG_CACHE_HOME or ~/.cache",
    "AWD_LSTM_DIR": "a checkout of salesforce/awd-lstm-lm",
    "TARGER_DIR": "a checkout of achernodub/targer",
}
#: Variables of checkouts -> the host.
_CHECKOUTS = {"AWD_LSTM_DIR": "awd_lstm", "TARGER_DIR": "targer"}
#: How the variables begin that only this project's tests read.
_OF_TESTS = "SD_PLUGIN_TEST_"
_CUPY = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def main(argv: Sequence[str]) -> int:
    """Print what is found; 1 if a variable has a problem, else 0."""
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
    return int(any(variable["problem"] for variable in found["environment"]))


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
        "environment": [*(_variable(name, environ) for name in VARIABLES), *_misspelt(environ)],
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
        return False, f"{VARIABLE} is not {'understood' if environ.get(VARIABLE, '').strip() else 'set'}{names}"
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
    from .kernels.cpu import library

    return library.describe()


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _variable(name: str, environ: Mapping[str, str]) -> dict[str, str | None]:
    value = environ.get(name)
    # Each is read by itself, so that a problem is told where it is.
    problem = _problem_of(name, environ if name == "SD_PLUGIN_CACHE" else {name: value or ""})
    return {"name": name, "value": value, "meaning": VARIABLES[name], "problem": problem}


def _misspelt(environ: Mapping[str, str]) -> list[dict[str, str | None]]:
    """Variables that are named as if they were this plugin's."""
    found: list[dict[str, str | None]] = []
    for name in sorted(environ):
        if name.startswith("SD_PLUGIN_") and name not in VARIABLES and not name.startswith(_OF_TESTS):
            close = difflib.get_close_matches(name, VARIABLES, n=1)
            problem = f"there is no such variable; did you mean {close[0]}?" if close else "there is no such variable"
            found.append({"name": name, "value": environ[name], "meaning": "unknown, and ignored", "problem": problem})
    return found


def _problem_of(name: str, environ: Mapping[str, str]) -> str | None:
    """Why a variable's value is not understood or cannot be used here, by those who read it; None if it can."""
    if name in (VARIABLE, TARGETS_VARIABLE):
        return read_switch(environ).problem
    if name in _CHECKOUTS:
        return _problem_of_checkout(name, environ)
    if name == "SD_PLUGIN_CACHE":
        from .kernels import cache_folder

        return cache_folder.problem(environ)
    try:
        _readers()[name](environ)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _readers() -> dict[str, Callable[[Mapping[str, str]], object]]:
    """Variable -> what reads it, or raises a ValueError or RuntimeError that names it and what is valid."""
    from .kernels.cpu import toolchain
    from .kernels.cuda import choices

    return {
        CASE_VARIABLE: read_case,
        RECURRENT_VARIABLE: read_recurrent_dropout,
        REPORT_VARIABLE: read_report,
        CHECK_VARIABLE: read_check,
        SKIP_FROM_VARIABLE: read_skip_from,
        "SD_PLUGIN_BACKEND": _check_backend,
        choices.RECURRENCE: lambda environ: choices.read(choices.RECURRENCE, environ),
        choices.PRODUCTS: lambda environ: choices.read(choices.PRODUCTS, environ),
        "SD_PLUGIN_CXX": toolchain.check_compiler,
        "SD_PLUGIN_CPU_ISA": toolchain.wanted_isa,
        "SD_PLUGIN_CPU_SANITIZE": toolchain.wanted_sanitizer,
    }


def _check_backend(environ: Mapping[str, str]) -> None:
    from . import kernels

    name = kernels.forced(environ)
    reason = None if name is None else kernels.status()[name]
    if reason is not None:
        raise kernels.BackendError(f"SD_PLUGIN_BACKEND={name} cannot run here: {reason}")


def _problem_of_checkout(name: str, environ: Mapping[str, str]) -> str | None:
    if not environ[name].strip():
        return None
    named, *_ = registry()[_CHECKOUTS[name]].find(environ)
    return named.problem


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
