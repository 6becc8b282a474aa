"""The parts of ``zaremba_main.py``, and each of its refusals: one line, exit status 2, nothing lost."""

from __future__ import annotations

import fcntl
import io
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Without these the script ends at once, and would end pytest.
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("yaml")
import torch
import training_display
import training_state
import zaremba_main
from language_model_data import columns, read_corpus, sequences
from rich.console import Console
from training_settings import Settings, read_settings
from typer.testing import CliRunner

from sd_plugin import UsageError

from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MEDIUM = ROOT / "configs" / "zaremba_medium.yaml"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"{part}.txt").write_text("a b c d\ne f g <unk>\n" * 6)
    return folder


@pytest.fixture
def zaremba(text: Path, tmp_path: Path) -> Callable[..., str]:
    """The program, in this process, on ``text`` into ``tmp_path / "run"``; what it says on standard error."""

    def run(*arguments: object, status: int = 0) -> str:
        sets = ("hidden_size=4", "batch_size=2", "sequence_length=4", "evaluation_batch_size=1", "epochs=2")
        command = [str(MEDIUM), f"--data={text}", f"--out={tmp_path / 'run'}", *(f"--set={change}" for change in sets)]
        done = CliRunner().invoke(zaremba_main.app, [*command, *map(str, arguments)])
        assert done.exit_code == status, done.output
        return done.stderr

    return run


def refusal(said: str) -> str:
    """The one line in which it says what is wrong."""
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# -------------------------------------------------------------------------------------------- the settings


def test_schedules_of_the_paper() -> None:
    medium, large = (read_settings(ROOT / "configs" / f"zaremba_{size}.yaml", {}) for size in ("medium", "large"))
    common = {"data": "data/ptb", "mode": "nr_rh_st", "num_layers": 2, "batch_size": 20, "sequence_length": 35}
    common |= {"evaluation_batch_size": 20, "learning_rate": 1.0, "seed": 1234}
    assert medium == Settings(
        **common, hidden_size=650, dropout=0.5, init_range=0.05, epochs=39, learning_rate_decay=1.2,
        decay_after_epoch=6, max_grad_norm=5.0,
    )  # fmt: skip
    assert large == Settings(
        **common, hidden_size=1500, dropout=0.65, init_range=0.04, epochs=55, learning_rate_decay=1.15,
        decay_after_epoch=14, max_grad_norm=10.0,
    )  # fmt: skip
    rates = [medium.learning_rate_of(epoch) for epoch in (1, 6, 7, 39)]
    assert rates == pytest.approx([1, 1, 1 / 1.2, 1.2**-33])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("mode=nr_sd", "unknown mode 'nr_sd'; choose one of random, nr_st, nr_rh_st"),
        ("hidden=3", f"{MEDIUM}: unknown key hidden; valid: data, mode, hidden_size,"),
        ("hidden_size=0", "hidden_size must be positive and finite, got 0"),
        ("hidden_size=2.5", "hidden_size must be a whole number, got 2.5"),
        ("hidden_size=true", "hidden_size must be a whole number, got True"),
        ("dropout=1", "dropout must be in [0, 1), got 1.0"),
        ("dropout=.nan", "dropout must be in [0, 1), got nan"),
        ("learning_rate=.inf", "learning_rate must be positive and finite, got inf"),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'"),
        ("seed=-1", "seed must be from 0 to 2**63 - 1, got -1"),
        ("dropout", "--set dropout: must be key=value"),
        ("dropout=[", "--set dropout=[: must be key=value"),
    ],
)
def test_wrong_setting(zaremba, tmp_path: Path, change: str, said: str) -> None:
    assert refusal(zaremba("--set", change, status=2)).startswith(said)
    assert not (tmp_path / "run").exists()


def test_text_and_numbers() -> None:
    with pytest.raises(UsageError, match="data must be text, got 3"):
        read_settings(MEDIUM, {"data": 3})
    # YAML takes 1e-3 for text.
    assert read_settings(MEDIUM, {"learning_rate": "1e-3"}).learning_rate == 0.001


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("data: [", "is not YAML: "),
        ("", "holds no settings"),
        ("data: x\nmode: random\n", "missing key hidden_size, num_layers, dropout, "),
    ],
)
def test_wrong_file_of_settings(tmp_path: Path, contents: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(contents)
    done = CliRunner().invoke(zaremba_main.app, [str(tmp_path / "x.yaml")])
    assert done.exit_code == 2
    assert said in refusal(done.stderr)


def test_missing_file_of_settings() -> None:
    done = CliRunner().invoke(zaremba_main.app, ["nowhere.yaml"])
    assert (done.exit_code, refusal(done.stderr)) == (2, "nowhere.yaml: No such file or directory")


# ------------------------------------------------------------------------------------------------ the text


def test_words_and_ends_of_lines(text: Path) -> None:
    # As in the Penn Treebank's files: spaces around a line, and a last line without an end.
    (text / "train.txt").write_text(" b a b \n\n b <unk>")
    (text / "valid.txt").write_text("c a\n")
    corpus = read_corpus(text)
    assert corpus.words == ["b", "<eos>", "a", "<unk>"]
    assert corpus.parts["train"].tolist() == [0, 2, 0, 1, 1, 0, 3, 1]
    assert corpus.parts["valid"].tolist() == [3, 2, 1]
    assert corpus.note == ""


def test_unknown_words_without_a_word_for_them(text: Path) -> None:
    (text / "train.txt").write_text("a b\n")
    (text / "valid.txt").write_text("a\nb\na c d\n")
    (text / "test.txt").write_text("a\n")
    corpus = read_corpus(text)
    assert corpus.words == ["a", "b", "<eos>", "<unk>"]
    assert corpus.parts["valid"].tolist() == [0, 2, 1, 2, 0, 3, 3, 2]
    assert corpus.note.startswith("2 words of valid and test are not in train")
    assert f"the first is 'c', {text / 'valid.txt'} line 3" in corpus.note


def test_names_of_the_penn_treebank(text: Path) -> None:
    digest = read_corpus(text).digest()
    for part in ("train", "valid", "test"):
        (text / f"{part}.txt").rename(text / f"ptb.{part}.txt")
    assert read_corpus(text).digest() == digest
    (text / "ptb.test.txt").write_text("b a\n")
    assert read_corpus(text).digest() != digest
    (text / "other.test.txt").write_text("a\n")
    with pytest.raises(UsageError, match=r"other\.test\.txt or .*ptb\.test\.txt\? There must be one"):
        read_corpus(text)


def test_columns_and_sequences() -> None:
    cut = columns(torch.arange(11), 2)
    assert cut.tolist() == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
    pieces = [(words.tolist(), targets.tolist()) for words, targets in sequences(cut, 3)]
    assert pieces == [([[0, 5], [1, 6], [2, 7]], [[1, 6], [2, 7], [3, 8]]), ([[3, 8]], [[4, 9]])]
    assert len(list(sequences(cut, 3, whole=True))) == 1
    assert len(list(sequences(cut, 2, whole=True))) == 2


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_missing_and_empty_text(zaremba, text: Path, part: str) -> None:
    file = text / f"{part}.txt"
    file.write_text("")
    assert refusal(zaremba(status=2)) == f"{file} is empty"
    file.write_bytes(b"a \xff\n")
    assert refusal(zaremba(status=2)).startswith(f"{file} is not UTF-8 text: ")
    file.unlink()
    said = refusal(zaremba(status=2))
    assert said.startswith(f"no {part}.txt or NAME.{part}.txt in {text}: run python scripts/get_data.py ptb")
    # It did not even leave its folder.
    assert not (text.parent / "run").exists()


def test_text_that_is_too_short(zaremba) -> None:
    assert refusal(zaremba("--set", "batch_size=20", status=2)).startswith("train has too few words for 20 columns")
    assert "cannot be read in 50 columns" in refusal(zaremba("--set", "evaluation_batch_size=50", status=2))


# ---------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def trained(zaremba, tmp_path: Path) -> Path:
    """The folder of a training stopped after its first epoch."""
    assert zaremba("--epochs", 1) == ""
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_with_a_checkpoint(zaremba, trained: Path) -> None:
    before = contents(trained)
    said = refusal(zaremba(status=2))
    assert said == f"{trained / 'checkpoint.pt'} is there: give --resume to continue it, or another folder with --out"
    assert contents(trained) == before


def test_folder_with_other_files(zaremba, trained: Path) -> None:
    (trained / "checkpoint.pt").unlink()
    assert "log.csv is there without its checkpoint" in refusal(zaremba(status=2))
    assert "has no checkpoint.pt to resume" in refusal(zaremba("--resume", status=2))


def test_another_training_is_not_resumed(zaremba, text: Path, trained: Path) -> None:
    before = contents(trained)
    said = refusal(zaremba("--resume", "--mode", "random", "--set", "hidden_size=5", "--seed", 3, status=2))
    differing = "mode was nr_rh_st and is random, hidden_size was 4 and is 5, seed was 1234 and is 3; "
    assert said.startswith(f"{trained / 'checkpoint.pt'} is of another training: {differing}")
    (text / "test.txt").write_text("a b c\n")
    assert "of another training: text was " in refusal(zaremba("--resume", status=2))
    assert contents(trained) == before


def test_longer_schedule_and_moved_text_are_the_same_training(zaremba, text: Path, trained: Path) -> None:
    moved = text.rename(text.with_name("moved"))
    assert zaremba("--resume", "--data", moved, "--set", "epochs=3") == ""
    assert len((trained / "log.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "foreign"])
def test_damaged_checkpoint(zaremba, trained: Path, damage: str) -> None:
    file = trained / "checkpoint.pt"
    whole = file.read_bytes()
    inside = whole.index(torch.load(file, weights_only=True)["model"]["lstm.weight_hh_l0"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[inside + 5] ^= 1
    foreign = io.BytesIO()
    torch.save({"model": {}}, foreign)
    file.write_bytes(
        {"cut": whole[:-100], "flipped": flipped, "empty": b"", "text": b"text", "foreign": foreign.getvalue()}[damage]
    )
    before = contents(trained)
    said = refusal(zaremba("--resume", status=2))
    assert said.startswith(f"{file} is {'no checkpoint of this program' if damage == 'foreign' else 'damaged ('}")
    assert "it was left as it is" in said
    assert contents(trained) == before


def test_no_damage_goes_unnoticed(trained: Path) -> None:
    """Whatever byte of the records is changed, or wherever it is cut: one error, of one kind."""
    file, rng = trained / "checkpoint.pt", random.Random(1)
    whole = file.read_bytes()
    good = training_state._read(file)
    noticed = 0
    for _ in range(200):
        broken = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        if len(broken) == len(whole):
            broken[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        file.write_bytes(broken)
        try:
            found = training_state._read(file)
        except UsageError:
            noticed += 1
            continue
        # Padding between the records means nothing.
        assert all(torch.equal(tensor, good["model"][name]) for name, tensor in found["model"].items())
    assert noticed > 100


def test_folder_in_use(zaremba, trained: Path) -> None:
    held = os.open(trained, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert refusal(zaremba("--resume", status=2)) == f"{trained} is in use by another run"
    os.close(held)
    assert zaremba("--resume") == ""


def test_folder_that_cannot_be_made_or_written(zaremba, text: Path, tmp_path: Path) -> None:
    file = text / "train.txt"
    assert refusal(zaremba("--out", file, status=2)) == f"{file}: File exists"
    assert refusal(zaremba("--out", file / "x", status=2)) == f"{file / 'x'}: Not a directory"
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "run").mkdir(mode=0o500)
        assert "Permission denied" in refusal(zaremba(status=2))


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    training_state.write_whole(file, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        training_state.write_whole(file, b"new")
    assert caught.value.filename == str(file)
    assert contents(tmp_path) == {"file": b"old"}


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mode", "x"), "unknown mode 'x'; choose one of random, nr_st, nr_rh_st"),
        (("--epochs", 3), "--epochs 3: the schedule ends after 2; --set epochs=3 extends it"),
        (("--device", "tpu"), "--device tpu: must be cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device cuda:99: "),
    ],
)
def test_wrong_option(zaremba, tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    assert refusal(zaremba(*options, status=2)).startswith(said)
    assert not (tmp_path / "run").exists()


def test_run_folder_is_named_after_model_and_mode(
    zaremba, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ("hidden_size=4", "batch_size=2", "sequence_length=4", "evaluation_batch_size=1", "epochs=1")
    command = [str(MEDIUM), f"--data={text}", "--mode=nr_st", *(f"--set={change}" for change in sets)]
    assert CliRunner().invoke(zaremba_main.app, command).exit_code == 0
    assert sorted(os.listdir("run/zaremba_medium_nr_st")) == ["checkpoint.pt", "log.csv", "result.json"]


def test_diverging_training_stops_and_keeps_what_it_had(zaremba, trained: Path) -> None:
    before = contents(trained)
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    state["model"]["projection.bias"][0] = float("nan")
    torch.save(state, trained / "checkpoint.pt")
    before = contents(trained)
    assert refusal(zaremba("--resume", status=1)).startswith("epoch 2: the loss is no longer finite")
    assert contents(trained) == before


def test_interruption(zaremba, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = contents(trained)
    monkeypatch.setattr(torch.optim.SGD, "step", interrupt)
    assert refusal(zaremba("--resume", status=130)).startswith("interrupted; --resume continues")
    assert contents(trained) == before


def test_progress_in_lines_and_as_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_display, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(training_display, "BAR_SECONDS", 0.0)
    for terminal in (False, True):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=120, highlight=False)
        with training_display.EpochDisplay("epoch 3 of 9", 4, 20, 2, console) as display:
            display.step(torch.tensor(20 * 2.0), 20)
            display.step(torch.tensor(40 * 3.0), 20)
        if terminal:
            assert "\x1b" in shown.getvalue() and "perplexity 20.1" in shown.getvalue()
            continue
        first, second = shown.getvalue().splitlines()
        assert first.startswith("epoch 3 of 9: step 1 of 4, perplexity 7.4, ")
        assert second.startswith("epoch 3 of 9: step 2 of 4, perplexity 20.1, ")
        assert second.endswith("0:00 left, 0:00 in all")


def test_nothing_is_read_from_the_device_when_nothing_is_shown() -> None:
    class Unread:
        def item(self) -> float:
            raise AssertionError

    with training_display.EpochDisplay("epoch", 4, 20, 0, Console(file=io.StringIO())) as display:
        display.step(Unread(), 20)
    with training_display.EpochDisplay("epoch", 4, 20, 0, None) as display:
        display.step(Unread(), 20)


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00"), (59.7, "1:00"), (3599, "59:59"), (3800, "1:03:20")])
def test_clock(seconds: float, said: str) -> None:
    assert training_display.clock(seconds) == said


def test_perplexity() -> None:
    assert training_display.perplexity(2.0, 2) == pytest.approx(2.718281828)
    assert training_display.perplexity(1e6, 2) == training_display.perplexity(float("nan"), 2) == float("inf")


@pytest.mark.parametrize("module", ["typer", "rich", "yaml", "sd_plugin"])
def test_what_it_needs_is_said_in_a_line(without, module: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "zaremba_main.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=without(module))
    assert done.returncode == 2
    assert done.stderr == "zaremba_main.py needs sd-plugin, typer, rich and PyYAML: pip install '.[demo]'\n"
