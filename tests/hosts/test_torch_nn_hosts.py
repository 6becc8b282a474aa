"""Language models of others, unmodified, with the generic patch: their own programs on a small corpus.

The checkouts are ``../hosts/zaremba`` (ahmetumutdurmus/zaremba) and ``../hosts/language_modeling_lstm``
(hjc18/language_modeling_lstm), or named by ``ZAREMBA_DIR`` and ``LANGUAGE_MODELING_LSTM_DIR``.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkouts import checkout

from ..environ import clean
from ..patience import PATIENCE

pytestmark = pytest.mark.hosts

if not list(Path(torch.__file__).parents[1].glob("sd_plugin*.dist-info")):
    pytest.skip("sd-plugin is not installed beside torch, so no program starts with it", allow_module_level=True)

TITLE = "sd-plugin: structured dropout report"
WORDS, HIDDEN, BATCH, STEPS, EPOCHS = 40, 32, 4, 8, 2
PATCHED = {"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "torch", "SD_PLUGIN_REPORT": "1"}
#: One product of one row and one set of gates, in multiply-adds.
GATES = 4 * HIDDEN * HIDDEN


#: The programs draw from torch's generator unseeded.
SEEDED = """
import runpy, sys, torch
torch.manual_seed(1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def corpus(train: int = 900) -> dict[str, list[str]]:
    """Words that mostly follow from the word before. First comes every word once: training has the vocabulary."""
    generator, texts = random.Random(4), {}
    for split, size in (("train", train), ("valid", 200), ("test", 200)):
        numbers = list(range(WORDS))
        for _ in range(size):
            likely = (7 * numbers[-1] + 3) % WORDS
            numbers.append(likely if generator.random() < 0.8 else generator.randrange(WORDS))
        texts[split] = [f"w{number}" for number in numbers]
    return texts


def copied(name: str, variable: str, folder: Path) -> Path:
    """The programs of a checkout, without its data."""
    for file in checkout(name, variable).glob("*.py"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def zaremba(tmp_path: Path) -> Path:
    folder = copied("zaremba", "ZAREMBA_DIR", tmp_path)
    (folder / "data").mkdir()
    write_zaremba(folder, corpus())
    return folder


def write_zaremba(folder: Path, texts: dict[str, list[str]]) -> None:
    for split, words in texts.items():
        # The program drops the first character, which is a blank in its files.
        (folder / "data" / f"ptb.{split}.txt").write_text(" " + " ".join(words))


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    folder = copied("language_modeling_lstm", "LANGUAGE_MODELING_LSTM_DIR", tmp_path)
    (folder / "input").mkdir()
    for split, words in corpus().items():
        lines = [" ".join(words[i : i + 10]) + "\n" for i in range(0, len(words), 10)]
        (folder / "input" / f"ptb.{split}.txt").write_text("".join(lines))
    return folder


def run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = clean()
    # language_modeling_lstm ends by loading the model that it has saved whole, which torch >= 2.6 refuses by default.
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command = [sys.executable, "-c", SEEDED, *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**kept, **environ}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_zaremba(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    options = {"layer_num": 2, "hidden_size": HIDDEN, "batch_size": BATCH, "seq_length": STEPS, "total_epochs": EPOCHS}
    small = [f"--{name}={value}" for name, value in {**options, "device": "cpu"}.items()]
    program, *own = arguments
    return run(folder, program, *small, *own, **environ)


def run_language_model(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    options = {"emsize": HIDDEN, "nhid": HIDDEN, "batch_size": BATCH, "bptt": STEPS, "lr": 2, "save": "model.pt"}
    return run(folder, "main.py", *[f"--{name}={value}" for name, value in options.items()], *arguments, **environ)


@dataclass
class Row:
    patterns: int
    dropped: str
    skipped: str
    lost: int


def rows(report: str) -> dict[str, Row]:
    found = re.findall(r"^  (\S.*?)  +(\d+) +([\d.]+%) +([\d.]+%) +0 +(\d+)$", report, re.MULTILINE)
    return {site: Row(int(patterns), dropped, skipped, int(lost)) for site, patterns, dropped, skipped, lost in found}


def millions(report: str) -> float:
    """Multiply-adds of all products that dropped units could be skipped in."""
    (dense,) = re.findall(r"of ([\d.]+) M multiply-adds of these products skipped", report)
    return float(dense)


def losses(output: str) -> list[str]:
    return re.findall(r"(?:loss =?|perplexity : |ppl)\s+([\d.]+)", output)


@pytest.mark.parametrize(("program", "models"), [("main.py", 1), ("ensemble.py", 2)])
def test_zaremba_skips_everywhere(zaremba: Path, program: str, models: int) -> None:
    extra = [f"--ensemble_num={models}"] if models > 1 else []
    done = run_zaremba(zaremba, program, "--dropout=0.5", *extra, **PATCHED)
    found = rows(done.stderr)
    assert set(found) == {f"dropout {HIDDEN}", f"lstm {HIDDEN}x{HIDDEN}.l0.recurrent"}
    assert all((row.dropped, row.skipped, row.lost) == ("50.0%", "50.0%", 0) for row in found.values())
    batches = EPOCHS * models * ((900 + WORDS) // BATCH // STEPS)
    # A dropout before each of two LSTMs and before the projection; both LSTMs are of one layer.
    assert [row.patterns for row in found.values()] == [3 * batches, 2 * batches]
    # Forward, input gradient and weight gradient of: input and recurrent product of two layers, and the projection.
    expected = batches * BATCH * STEPS * 3 * (4 * GATES + HIDDEN * WORDS)
    assert millions(done.stderr) == pytest.approx(expected / 1e6, abs=0.006)


def test_zaremba_learns_with_structured_dropout(zaremba: Path) -> None:
    write_zaremba(zaremba, corpus(train=4000))
    options = ["main.py", "--dropout=0.2", "--winit=0.1", "--total_epochs=8", "--learning_rate=2", "--factor_epoch=8"]
    structured, stock = (
        float(re.findall(r"Test set perplexity : ([\d.]+)", run_zaremba(zaremba, *options, **environ).stdout)[0])
        for environ in (PATCHED, {"SD_PLUGIN": "0"})
    )
    # Who knows how often each word comes, but not after what, is left with all of them.
    assert stock < WORDS / 2, "the program itself has learned"
    assert structured == pytest.approx(stock, rel=0.25)


@pytest.mark.parametrize("kind", ["pytorch", "custom"])
def test_zaremba_without_dropout_is_the_same_program(zaremba: Path, kind: str) -> None:
    options = ["main.py", "--dropout=0.0", f"--lstm_type={kind}"]
    expected = losses(run_zaremba(zaremba, *options, SD_PLUGIN="0").stdout)
    assert len(expected) > 20
    assert losses(run_zaremba(zaremba, *options, **PATCHED).stdout) == expected


def test_zarembas_own_lstm_is_left_alone(zaremba: Path) -> None:
    options = ["main.py", "--dropout=0.5", "--lstm_type=custom"]
    expected = losses(run_zaremba(zaremba, *options, SD_PLUGIN="0").stdout)
    done = run_zaremba(zaremba, *options, **PATCHED)
    assert losses(done.stdout) == expected
    first, *rest = done.stderr.splitlines()
    assert first == f"{TITLE}: no unit was dropped"
    assert any("of a width that no usable nn.LSTM has" in line for line in rest), "and why"


def test_language_model_skips_everywhere_and_its_checkpoint_is_torchs_own(language_model: Path) -> None:
    done = run_language_model(language_model, "--dropout=0.5", f"--epochs={EPOCHS}", **PATCHED)
    found = rows(done.stderr)
    lstm = f"lstm {HIDDEN}x{HIDDEN}"
    assert list(found) == [f"dropout {HIDDEN}", f"{lstm}.l0.recurrent", f"{lstm}.l1.input", f"{lstm}.l1.recurrent"]
    assert all((row.dropped, row.skipped, row.lost) == ("50.0%", "50.0%", 0) for row in found.values())
    # Every line has an <eos>. The last batch of an epoch is shorter.
    steps = (900 + WORDS) // 10 * 11 // BATCH - 1
    batches = EPOCHS * -(-steps // STEPS)
    assert [row.patterns for row in found.values()] == [2 * batches, batches, batches, batches]
    expected = EPOCHS * steps * BATCH * 3 * (4 * GATES + HIDDEN * (WORDS + 1))
    assert millions(done.stderr) == pytest.approx(expected / 1e6, abs=0.006)
    assert b"sd_plugin" not in (language_model / "model.pt").read_bytes()
    without = run_language_model(language_model, "--epochs=0", SD_PLUGIN="0")
    assert losses(without.stdout) == losses(done.stdout)[-2:], "the test loss of the model that was saved"


def test_language_model_without_dropout_is_the_same_program(language_model: Path) -> None:
    options = ["--dropout=0.0", f"--epochs={EPOCHS}"]
    expected = losses(run_language_model(language_model, *options, SD_PLUGIN="0").stdout)
    assert len(expected) == 2 * (EPOCHS + 1)
    assert losses(run_language_model(language_model, *options, **PATCHED).stdout) == expected
