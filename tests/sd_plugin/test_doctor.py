"""``sd-plugin doctor``: hosts, backends and settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sd_plugin import doctor, kernels, patches
from sd_plugin._environment import TARGETS
from sd_plugin.patches import Finding, Host

from ..forks import Forks

#: A folder without a clone in it.
ELSEWHERE = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    """Without the variables that the command tells of, but for some."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SD_PLUGIN", "AWD_", "TARGER_"))} | more


@pytest.fixture
def run(fork: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return fork("-m", ["sd_plugin", "doctor", *arguments], cwd=ELSEWHERE, env=environment(**environ))

    return run


def host(report: dict, name: str) -> dict:
    return next(host for host in report["hosts"] if host["name"] == name)


def test_every_host_backend_and_variable_is_listed():
    """As a user runs it."""
    command = [sys.executable, "-m", "sd_plugin", "doctor", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, cwd=ELSEWHERE)
    report = json.loads(done.stdout)
    assert done.returncode == any(variable["problem"] for variable in report["environment"]), done.stderr
    assert [host["name"] for host in report["hosts"]] == list(patches.hosts())
    assert [backend["name"] for backend in report["backends"]] == list(kernels.status())
    assert report["hook"]["installed"]
    reference = next(backend for backend in report["backends"] if backend["name"] == "reference")
    assert reference["available"]
    assert all(backend["available"] or backend["why"] for backend in report["backends"])
    assert {variable["name"] for variable in report["environment"]} == set(doctor.VARIABLES)


def test_the_text_names_the_same(run):
    done = run(SD_PLUGIN_BACKEND="reference")
    assert done.stderr == ""
    for entry in patches.registry().values():
        assert entry.title in done.stdout
        assert entry.supported in done.stdout
    assert "SD_PLUGIN_BACKEND = reference" in done.stdout


@pytest.mark.parametrize(
    ("environ", "patched", "why"),
    [
        ({}, False, "SD_PLUGIN is not set"),
        ({"SD_PLUGIN": "maybe"}, False, "SD_PLUGIN is not understood"),
        ({"SD_PLUGIN": "1"}, False, "torch is not in SD_PLUGIN_TARGETS"),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "torch"}, True, "mode nr_rh_st"),
        ({"SD_PLUGIN": "nr_st", "SD_PLUGIN_TARGETS": "torch"}, True, "mode nr_st"),
        ({"SD_PLUGIN": "0", "SD_PLUGIN_TARGETS": "torch"}, False, "SD_PLUGIN switches everything off"),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "torch", "SD_PLUGIN_CASE": "V"}, False, "is no case"),
        ({"SD_PLUGIN": "random", "SD_PLUGIN_TARGETS": "torch"}, False, "leaves torch as it is"),
        (
            {"SD_PLUGIN": "nr_st", "SD_PLUGIN_TARGETS": "torch", "SD_PLUGIN_RECURRENT_DROPOUT": "0.3"},
            False,
            "nr_st has no recurrent dropout",
        ),
    ],
)
def test_whether_and_why_a_program_on_torch_is_patched(environ, patched, why):
    (finding,) = host(doctor.examine(environ), "torch_nn")["found"]
    assert finding["patched"] is patched
    assert why in finding["why"]


def test_a_checkout_that_is_something_else_is_told(tmp_path):
    (tmp_path / "weight_drop.py").write_text("class WeightDrop: ...\n")
    (finding,) = host(doctor.examine({"AWD_LSTM_DIR": str(tmp_path), "SD_PLUGIN": "1"}), "awd_lstm")["found"]
    assert not finding["patched"]
    assert "is not a checkout of awd-lstm-lm" in finding["why"]
    assert finding["where"] == str(tmp_path)


def test_settings_that_are_not_understood_are_told():
    report = doctor.examine({"SD_PLUGIN": "maybe", "SD_PLUGIN_TARGETS": "keras", "SD_PLUGIN_RECURRENT_DROPOUT": "2"})
    problems = {entry["name"]: entry["problem"] for entry in report["environment"] if entry["problem"]}
    assert set(problems) == {"SD_PLUGIN", "SD_PLUGIN_TARGETS", "SD_PLUGIN_RECURRENT_DROPOUT"}
    assert "'maybe'" in problems["SD_PLUGIN"]
    assert "keras" in problems["SD_PLUGIN_TARGETS"]


def problems(**environ: str) -> dict[str, str]:
    return {entry["name"]: entry["problem"] for entry in doctor.examine(environ)["environment"] if entry["problem"]}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SD_PLUGIN", "maybe", "valid: 0"),
        ("SD_PLUGIN_TARGETS", "keras", "valid: awd_lstm"),
        ("SD_PLUGIN_CASE", "V", "valid: I, II"),
        ("SD_PLUGIN_RECURRENT_DROPOUT", "nan", "a number in [0, 1)"),
        ("SD_PLUGIN_BACKEND", "gpu", "valid: auto, cuda, cpu, reference"),
        ("SD_PLUGIN_CUDA_RECURRENCE", "step", "valid: auto, persistent, steps"),
        ("SD_PLUGIN_CUDA_PRODUCTS", "sparse", "valid: auto, skip, dense"),
        ("SD_PLUGIN_CXX", "no-such-compiler", "no such program"),
        ("SD_PLUGIN_CXX", "false", "does not run"),
        ("SD_PLUGIN_CPU_ISA", "sse9", "valid: avx512, avx2, portable"),
        ("SD_PLUGIN_CPU_SANITIZE", "thread", "valid: address"),
        ("SD_PLUGIN_REPORT", "perhaps", "valid: 0"),
        ("SD_PLUGIN_CACHE", "/dev/null/cache", "Not a directory"),
        ("AWD_LSTM_DIR", "/nowhere", "/nowhere is not a folder"),
        ("TARGER_DIR", "/", "is not a checkout of targer"),
        ("SD_PLUGIN_BACKENDS", "cpu", "did you mean SD_PLUGIN_BACKEND?"),
        ("SD_PLUGIN_RECURENCE", "", "there is no such variable"),
    ],
)
def test_a_value_that_is_not_understood_is_a_problem_of_its_variable(name, value, told):
    (problem,) = (problems(**{name: value}).items()) - problems().items()
    assert problem[0] == name
    assert told in problem[1]
    assert "\n" not in problem[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("SD_PLUGIN_BACKEND", ["", "auto", "Reference"]),
        ("SD_PLUGIN_CUDA_RECURRENCE", ["", "auto", "persistent", " STEPS "]),
        ("SD_PLUGIN_CUDA_PRODUCTS", ["", "auto", "skip", "dense"]),
        ("SD_PLUGIN_CXX", [""]),
        ("SD_PLUGIN_CPU_ISA", ["", "portable"]),
        ("SD_PLUGIN_CPU_SANITIZE", ["", "undefined"]),
        ("SD_PLUGIN_REPORT", ["", "0", "1", "on", "off"]),
        ("SD_PLUGIN_TEST_DATA", ["anything"]),
        ("AWD_LSTM_DIR", [""]),
    ],
)
def test_values_that_are_understood_are_none(name, values):
    for value in values:
        assert problems(**{name: value}) == problems()


def test_a_backend_that_cannot_run_here_is_a_problem(monkeypatch):
    monkeypatch.setattr(
        kernels, "status", lambda: {"cuda": "torch finds no CUDA device", "cpu": None, "reference": None}
    )
    assert "torch finds no CUDA device" in problems(SD_PLUGIN_BACKEND="cuda")["SD_PLUGIN_BACKEND"]
    assert "SD_PLUGIN_BACKEND" not in problems(SD_PLUGIN_BACKEND="cpu")


def test_a_cache_that_others_can_write_is_a_problem(tmp_path):
    tmp_path.chmod(0o777)
    problem = problems(SD_PLUGIN_CACHE=str(tmp_path))["SD_PLUGIN_CACHE"]
    assert f"chmod go-w {tmp_path}" in problem
    assert problems(SD_PLUGIN_CACHE=str(tmp_path / "cache"))["SD_PLUGIN_CACHE"] == problem
    # Whether it was named or is where it always is.
    assert problems(XDG_CACHE_HOME=str(tmp_path))["SD_PLUGIN_CACHE"] == problem


def test_a_problem_is_shown_and_makes_the_exit_status(run):
    done = run(SD_PLUGIN_CUDA_PRODUCTS="sparse", SD_PLUGIN_BACKEN="cpu", SD_PLUGIN_BACKEND="reference")
    assert done.returncode == 1
    assert done.stderr == ""
    assert "problem: SD_PLUGIN_CUDA_PRODUCTS=sparse is not valid; valid: auto, skip, dense\n" in done.stdout
    assert "SD_PLUGIN_BACKEN = cpu\n" in done.stdout


def test_without_start_up_files_nothing_counts_as_patched(fork):
    code = "import sys; from sd_plugin import _autoload, doctor; _autoload.uninstall(); doctor.main(['--json'])"
    environ = {**os.environ, "SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "torch"}
    report = json.loads(fork("-c", [code], cwd=ELSEWHERE, env=environ).stdout)
    assert not report["hook"]["installed"]
    (finding,) = host(report, "torch_nn")["found"]
    assert not finding["patched"]
    assert "python -m sd_plugin" in finding["why"]


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("2.2.2", None), ("2.14.1+cu128", None),
        ("2.15.0", "newer than what this version of sd-plugin was tested with 2.2 to 2.14"),
        ("3.0.0a0+git1", "newer than"), ("2.1.2", "not supported: tested with"), ("built by hand", "not supported"),
    ],
)  # fmt: skip
def test_a_torch_that_was_not_tested_is_told_in_one_line(monkeypatch, version, told):
    monkeypatch.setattr(torch, "__version__", version)
    report = doctor.examine({})
    assert (report["untested"] or "").startswith(f"torch {version} " if told else "")
    assert (told is None) is (report["untested"] is None)
    lines = doctor.render(report).splitlines()
    assert sum(told in line for line in lines) == 1 if told else lines[1].startswith("start-up hook")


def test_a_torch_that_was_not_tested_is_no_reason_to_warn(fork):
    program = (
        "import warnings; warnings.simplefilter('error');"
        "import torch; torch.__version__ = '2.99.0'; import sd_plugin, sd_plugin.patches; sd_plugin.enable('torch_nn');"
        "torch.nn.LSTM(3, 4)(torch.ones(2, 1, 3))"
    )
    done = fork("-c", [program], cwd=ELSEWHERE, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_option_is_wrong_use(run):
    done = run("--jsn")
    assert done.returncode == 2
    assert "--jsn" in done.stderr


def test_every_host_declares_itself():
    registered = patches.registry()
    assert list(registered) == list(patches.hosts())
    for name, entry in registered.items():
        assert isinstance(entry, Host)
        assert entry.name == name
        assert entry.target in TARGETS
        assert entry.modules
        # Another test of this process may have imported the host.
        assert entry.enabled() in (False, True)
        assert all(isinstance(finding, Finding) for finding in entry.find({}))


def test_no_host_is_imported_to_be_found(fork):
    code = (
        "import sys; from sd_plugin import doctor; doctor.main([]);"
        "print([name for name in ('onmt', 'fastai', 'weight_drop') if name in sys.modules])"
    )
    assert fork("-c", [code], cwd=ELSEWHERE, env=os.environ).stdout.splitlines()[-1] == "[]"


def test_no_host_is_enabled_before_it_is_imported(fork):
    program = "from sd_plugin import patches; print([n for n, host in patches.registry().items() if host.enabled()])"
    assert fork("-c", [program], cwd=ELSEWHERE, env=os.environ).stdout == "[]\n"
