"""``demo.py``: it tells a failed stage from a good run. The run itself takes minutes: ``make demo``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Without these the script ends at once, and would end pytest.
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("yaml")
import demo
from typer.testing import CliRunner

from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

LOG = """\
[2026-01-02 03:04:05,678 INFO] Step 1200/ 1200; acc: 99.9; ppl:   1.0
[2026-01-02 03:04:06,001 INFO] sd-plugin: structured dropout report
site        dropped
encoder 0   20%

decoder 0   20%
[2026-01-02 03:04:06,100 INFO] Saving checkpoint
"""


def test_report_is_cut_out_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert demo.report_in(tmp_path / "log").splitlines() == [
        "sd-plugin: structured dropout report",
        "site        dropped",
        "encoder 0   20%",
        "",
        "decoder 0   20%",
    ]


def test_report_at_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(LOG.splitlines(keepends=True)[:-1]))
    assert demo.report_in(tmp_path / "log").endswith("decoder 0   20%")


def test_missing_report_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG.splitlines()[0])
    with pytest.raises(demo.DemoError, match="no report of the plugin"):
        demo.report_in(tmp_path / "log")


def test_score() -> None:
    pytest.importorskip("sacrebleu")
    lines = ["one hundred and twenty three", "forty two thousand and one"]
    bleu, signature = demo.score(lines, lines)
    assert bleu == pytest.approx(100)
    assert "tok:none" in signature
    assert demo.score(["one hundred and thirty three", lines[1]], lines)[0] < 90
    with pytest.raises(demo.DemoError, match="1 translations of 2"):
        demo.score(lines[:1], lines)


def test_program_that_is_not_installed() -> None:
    with pytest.raises(demo.DemoError, match="onmt_nothing is not installed"):
        demo.run("onmt_nothing", stock=True)


def test_failing_program_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "failing"
    program.write_text("#!/bin/sh\nseq 100\necho the reason >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    seen: list[str] = []
    with pytest.raises(demo.DemoError, match="failing failed with exit status 3") as caught:
        demo.run("failing", stock=True, on_line=seen.append)
    assert str(caught.value).endswith("100\nthe reason\n")
    assert len(str(caught.value).splitlines()) == 1 + 15
    assert len(seen) == 101


def test_stock_run_keeps_the_plugin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN", "nr_st")
    assert demo.environment(stock=True)["SD_PLUGIN"] == "0"
    assert demo.environment(stock=False)["SD_PLUGIN"] == "nr_st"


def test_its_programs_have_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert demo.environment(stock=True)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("arguments", "culprit"), [(["--nonsense"], "--nonsense"), (["--min-bleu=x"], "--min-bleu")])
def test_a_wrong_command_line_is_told_in_a_line(arguments: list[str], culprit: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and culprit in line


@pytest.mark.parametrize("module", ["typer", "rich", "yaml"])
def test_what_it_needs_is_said_in_a_line(without, module: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=without(module))
    assert done.returncode == 2
    assert done.stderr == "demo.py needs typer, rich and PyYAML: pip install '.[demo]'\n"


@pytest.mark.parametrize("value", ["nan", "-1", "101"])
def test_bleu_that_there_is_not(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "demo", lambda *_: pytest.fail("it must not start"))
    assert CliRunner().invoke(demo.app, [f"--min-bleu={value}"]).exit_code == 2


@pytest.mark.exhaustive
@pytest.mark.hosts
def test_failed_stage_ends_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("num2words")
    # It may be installed without what it needs.
    pytest.importorskip("onmt.inputters", reason="OpenNMT-py is not installed")
    for folder in ("scripts", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = tmp_path / "configs" / "demo.yaml"
    config.write_text(config.read_text().replace("train.de", "nowhere.de"))
    command = [sys.executable, str(tmp_path / "scripts" / "demo.py"), "--stock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: onmt_build_vocab failed")
    assert "train/path_src" in done.stderr
    assert "BLEU" not in done.stdout
