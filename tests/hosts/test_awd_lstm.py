"""The real awd-lstm-lm, unmodified, on a small text: `scripts/awd_main.py`, and its own program with the hook.

Needs a checkout: ``AWD_LSTM_DIR``, or ``../hosts/awd-lstm-lm``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkouts import checkout

from sd_plugin.patches.awd_lstm import CHECKOUT

from ..environ import clean
from ..patience import PATIENCE

pytestmark = pytest.mark.hosts

ROOT = Path(__file__).resolve().parents[2]
REPORT = "sd-plugin: structured dropout report"
SIZES = ("--cuda", "--emsize", "16", "--nhid", "20", "--nlayers", "3", "--batch_size", "4", "--bptt", "12")
#: No unit is dropped at this rate, but all that drops them is run.
NEVER = "1e-9"
#: SGD with this learning rate overshoots in every other epoch, so that the host soon goes over to its average.
AVERAGED = ("--epochs", "8", "--lr", "30", "--nonmono", "1")
#: A loss below this has learned something: a word of 41 costs log 41 = 3.7 when it is guessed.
LEARNED = 3.2


@pytest.fixture(scope="module")
def awd_lstm() -> Iterator[Path]:
    """The checkout, which stays as it was."""
    folder = checkout("awd-lstm-lm", "AWD_LSTM_DIR")
    before = status(folder)
    yield folder
    assert status(folder) == before


def status(folder: Path) -> str:
    """What git says of the files, ignored ones included; nothing without git."""
    if shutil.which("git") is None or not (folder / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", "-C", str(folder), "status", "--porcelain", "--ignored"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a corpus of a few thousand words."""
    rng = np.random.default_rng(1)
    words = [f"word{n}" for n in range(40)]
    folder = tmp_path / "data" / "penn"
    folder.mkdir(parents=True)
    for part, lines in (("train", 200), ("valid", 50), ("test", 10)):
        chosen = rng.zipf(1.5, (lines, 8)) % len(words)
        (folder / f"{part}.txt").write_text("".join(" ".join(words[n] for n in line) + "\n" for line in chosen))
    return tmp_path


def environ(**changes: str) -> dict[str, str]:
    kept = clean("AWD_LSTM", "PYTHON", "COV_")
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore", **changes}


def python(*command: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE,
        env=environ(**changes), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def launch(host: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python(ROOT / "scripts" / "awd_main.py", "--awd-dir", host, *arguments, cwd=cwd)


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:valid|val|test) loss\s+([\d.]+)", text)]


def rows(report: str) -> dict[str, list[str]]:
    """The rows of the report, by place."""
    lines = report[report.index(REPORT) :].splitlines()[2:]
    # The sums and explanations come after them.
    ends = next(number for number, line in enumerate(lines) if "multiply-adds of these products skipped" in line)
    return {line.split()[0]: line.split()[1:] for line in lines[:ends]}


def assert_none_lost(report: str, recurrent: bool = True) -> None:
    expected = {"embedding", "rnns.1.input", "rnns.2.input", "output"}
    if recurrent:
        expected |= {f"rnns.{layer}.l0.recurrent" for layer in range(3)}
    found = rows(report)
    assert set(found) == expected
    assert len({row[0] for row in found.values()}) == 1, "as many patterns everywhere"
    for place, (_, dropped, skipped, waived, lost) in found.items():
        assert (waived, lost) == ("0", "0"), place
        assert dropped == skipped != "0.0%", place


def test_the_checkout_is_the_one_that_is_supported(awd_lstm: Path) -> None:
    assert CHECKOUT.problem(awd_lstm) is None


@pytest.mark.parametrize("sd", [[], ["--sd"]], ids=["random", "nr_rh_st"])
def test_all_programs_one_after_the_other(awd_lstm: Path, work: Path, sd: list[str]) -> None:
    done = launch(awd_lstm, *sd, *SIZES, *AVERAGED, "--save", "model.pt", cwd=work)
    assert "Switching to ASGD" in done.stdout
    assert "Saving Averaged!" in done.stdout
    assert "| End of training" in done.stdout
    assert 1 < losses(done.stdout)[-1] < LEARNED
    reports = [done.stderr]

    done = launch(
        awd_lstm, *sd, *SIZES, "--epochs", 1, "--lr", 1, "--resume", "model.pt", "--save", "resumed.pt", cwd=work
    )
    assert "Loading cached dataset..." in done.stdout
    assert losses(done.stdout)[-1] < LEARNED
    assert (work / "resumed.pt").is_file()
    reports.append(done.stderr)

    done = launch(
        awd_lstm, *sd, "--script", "finetune", *SIZES, "--epochs", 1, "--lr", 1, "--save", "model.pt", cwd=work
    )
    assert "| End of training" in done.stdout
    assert losses(done.stdout)[-1] < LEARNED
    reports.append(done.stderr)

    done = launch(awd_lstm, *sd, "--script", "generate", "--checkpoint", "model.pt", "--words", 30, cwd=work)
    words = (work / "generated.txt").read_text().split()
    assert len(words) == 30
    assert len(set(words)) > 3
    assert REPORT not in done.stderr, "nothing is dropped"

    pointer = ("--script", "pointer", "--cuda", "--save", "model.pt", "--window", 20)
    done = launch(awd_lstm, *sd, *pointer, cwd=work)
    assert len(losses(done.stdout)) == 2
    assert all(loss < LEARNED for loss in losses(done.stdout))
    assert REPORT not in done.stderr

    for report in reports:
        if sd:
            assert_none_lost(report)
        else:
            assert REPORT not in report
    assert b"sd_plugin" not in (work / "model.pt").read_bytes()


def test_where_nothing_is_dropped_the_host_trains_as_ever(awd_lstm: Path, work: Path) -> None:
    """All of the structured path runs, weight drop's too; the sequence lengths do not depend on what torch draws."""
    rates = [word for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop") for word in (f"--{name}", NEVER)]
    run = [*SIZES, *rates, "--epochs", 2, "--lr", 1, "--log-interval", 1]
    printed = [launch(awd_lstm, *sd, *run, "--save", "model.pt", cwd=work) for sd in ([], ["--sd"])]
    # Of each batch and each evaluation, to the digits that the host prints.
    found = [
        [float(value) for value in re.findall(r"(?:\| loss|valid loss|test loss)\s+([\d.]+)", done.stdout)]
        for done in printed
    ]
    assert len(found[0]) > 50
    assert found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], abs=0.0101)
    perplexities = [[float(p) for p in re.findall(r"ppl\s+([\d.]+)", done.stdout)] for done in printed]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-3)
    assert {row[1] for row in rows(printed[1].stderr).values()} == {"0.0%"}
    assert len(rows(printed[1].stderr)) == 7


def test_a_gru_with_adam(awd_lstm: Path, work: Path) -> None:
    options = ("--model", "GRU", "--optimizer", "adam", "--lr", "0.01", "--epochs", 2, "--save", "model.pt")
    done = launch(awd_lstm, "--sd", *SIZES, *options, cwd=work)
    assert losses(done.stdout)[-1] < losses(done.stdout)[0] + 0.1
    found = rows(done.stderr)
    assert set(found) == {"embedding", "rnns.1.input", "rnns.2.input", "output"}
    assert found["output"][4] == "0", "the product with the vocabulary skips"
    assert found["embedding"][4] == found["embedding"][0], "torch's GRU does not, and that is told"


@pytest.mark.parametrize("mode", ["1", "nr_st"])
def test_its_own_program_with_the_hook(awd_lstm: Path, work: Path, mode: str) -> None:
    own = work / "own"
    shutil.copytree(awd_lstm, own, ignore=shutil.ignore_patterns(".git", "data", "__pycache__"))
    run = [*SIZES, "--epochs", 2, "--lr", 5, "--data", work / "data" / "penn", "--save", "model.pt"]
    done = python("main.py", *run, cwd=own, SD_PLUGIN=mode, SD_PLUGIN_REPORT="1")
    assert "| End of training" in done.stdout
    assert_none_lost(done.stderr, recurrent=mode == "1")
    model, _, _ = load(own)
    assert {type(module).__module__.partition(".")[0] for module in model.modules()} <= {
        "torch", "model", "weight_drop", "locked_dropout",
    }  # fmt: skip


def load(folder: Path) -> list[torch.nn.Module]:
    """A checkpoint, with the host's modules importable for as long as it takes."""
    names = ("model", "weight_drop", "locked_dropout", "embed_regularize", "splitcross")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return list(torch.load(folder / "model.pt", weights_only=False))
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
