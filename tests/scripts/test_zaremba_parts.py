"""The parts of ``zaremba_main.py``, and each of its refusals: one line, exit status 2, nothing lost."""

from __future__ import annotations

import fcntl
import io
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Without these the script ends at once, and would end pytest.
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("yaml")
import torch
import training_display
import training_state
import zaremba_main
from data_parallel import Variables
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
        ("mode=nr_sd", "mode must be one of random, nr_st, nr_rh_st, got 'nr_sd'"),
        ("hidden=3", "--set: unknown key hidden; valid: data, mode, hidden_size,"),
        ("hidden_size=0", "hidden_size must be a whole number from 1 to 2**63 - 1, got 0"),
        ("hidden_size=2.5", "hidden_size must be a whole number from 1 to 2**63 - 1, got 2.5"),
        ("hidden_size=true", "hidden_size must be a whole number from 1 to 2**63 - 1, got True"),
        ("hidden_size='3'", "hidden_size must be a whole number from 1 to 2**63 - 1, got '3'"),
        ("dropout=1", "dropout must be a finite number of at least 0 and below 1, got 1"),
        ("dropout=.nan", "dropout must be a finite number of at least 0 and below 1, got nan"),
        ("learning_rate=.inf", "learning_rate must be a finite number above 0 and of at most 3.40282e+38, got inf"),
        ("learning_rate=fast", "learning_rate must be a finite number above 0 and of at most 3.40282e+38, got 'fast'"),
        ("learning_rate=true", "learning_rate must be a finite number above 0 and of at most 3.40282e+38, got True"),
        ("learning_rate=-0.0", "learning_rate must be a finite number above 0 and of at most 3.40282e+38, got -0.0"),
        ("seed=-1", "seed must be a whole number from 0 to 2**63 - 1, got -1"),
        ("dropout", "--set dropout: must be key=value"),
        ("dropout=[", "--set dropout: its value is not YAML: line 1, column 2: "),
        # What earlier ended in a traceback.
        (f"hidden_size={'9' * 5000}", "--set hidden_size: its value is not YAML: line 1, column 1: '999"),
        (
            f"hidden_size=0x{'f' * 5000}",
            "hidden_size must be a whole number from 1 to 2**63 - 1, got a number of",
        ),
        (f"hidden_size={'[' * 3000}", "--set hidden_size: its value is not YAML: line 1, column 21: more than 20 val"),
        ("mode={a: &a [1, 1], b: [*a, *a]}", "--set mode: its value is not YAML: line 1, column 20: aliases are not"),
        ("mode=[1, [2, [3, 4], 5, 6, 7]]", "mode must be one of random, nr_st, nr_rh_st, got [1, [2, [...], 5, ...]]"),
        ("dropout=2026-13-45", "--set dropout: its value is not YAML: line 1, column 1: '2026-13-45' cannot be read"),
        ("dropout=!!bool maybe", "--set dropout: its value is not YAML: line 1, column 1: 'maybe' cannot be read as"),
        ("learning_rate=1e39", "learning_rate must be a finite number above 0 and of at most 3.40282e+38, got '1e39'"),
        ("init_range=3e38", "init_range must be a finite number above 0 and of at most 1.70141e+38, got '3e38'"),
        *(
            (f"learning_rate_decay={decay}", f"learning_rate_decay {float(decay):g} takes the learning rate out of the")
            for decay in ("1e200", "1e-200")
        ),
        ("hidden_size=1000000000", "a model with hidden_size 1000000000 and num_layers 2 needs 5.96e+10 GiB, and this"),
        ("num_layers=1000000000", "a model with hidden_size 4 and num_layers 1000000000 needs 4.41e+03 GiB, and this"),
        ("sequence_length=1000000000", "train has too few words for 2 columns of sequence_length + 1"),
        ("batch_size=1000000000", "a text of 60 words cannot be read in 1000000000 columns"),
        ("evaluation_batch_size=1000000000", "a text of 60 words cannot be read in 1000000000 columns"),
    ],
)
def test_wrong_setting(zaremba, tmp_path: Path, change: str, said: str) -> None:
    # A schedule that the decay has a part in.
    line = refusal(zaremba("--set=epochs=9", "--set", change, status=2))
    assert line.startswith(said)
    assert len(line) < 400
    assert not (tmp_path / "run").exists()


def test_text_and_numbers() -> None:
    with pytest.raises(UsageError, match="data must be text, got 3"):
        read_settings(MEDIUM, {"data": 3})
    for path in ("a\0b", "a" * 5000):
        with pytest.raises(UsageError, match="data must be the path of a folder, got 'a"):
            read_settings(MEDIUM, {"data": path})
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


def _drop_tensor(state: dict[str, Any]) -> None:
    del state["model"]["lstm.weight_hh_l0"]


def _add_tensor(state: dict[str, Any]) -> None:
    state["model"]["lstm.weight_hh_l9"] = torch.zeros(2)


def _cut_tensor(state: dict[str, Any]) -> None:
    state["model"]["lstm.weight_hh_l0"] = state["model"]["lstm.weight_hh_l0"][:3]


def _halve_tensor(state: dict[str, Any]) -> None:
    state["model"]["lstm.bias_hh_l0"] = state["model"]["lstm.bias_hh_l0"].half()


def _empty_tensor(state: dict[str, Any]) -> None:
    state["model"]["lstm.bias_hh_l0"] = torch.empty(16, device="meta")


def _list_for_tensor(state: dict[str, Any]) -> None:
    state["model"]["projection.bias"] = [0.0] * 8


def _no_number(state: dict[str, Any]) -> None:
    state["model"]["projection.bias"][0] = float("nan")


def _other_option(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["weight_decay"] = 0.5


def _momentum(state: dict[str, Any]) -> None:
    state["optimizer"]["state"] = {0: {"momentum_buffer": torch.zeros(3)}}


def _row_without_column(state: dict[str, Any]) -> None:
    del state["log"][0]["seconds"]


def _text_in_row(state: dict[str, Any]) -> None:
    state["log"][0]["train_perplexity"] = "low"


def _set(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: value})


#: What becomes of a checkpoint, and how that is told.
BROKEN = [
    (_drop_tensor, "model: lstm.weight_hh_l0 is missing"),
    (_add_tensor, "model: 'lstm.weight_hh_l9' is unknown"),
    (_cut_tensor, "model: lstm.weight_hh_l0 is float32[3, 4], and must be float32[16, 4]"),
    (_halve_tensor, "model: lstm.bias_hh_l0 is float16[16], and must be float32[16]"),
    (_empty_tensor, "model: lstm.bias_hh_l0 is float32[16] (torch.strided, meta), and must be float32[16]"),
    (_list_for_tensor, "model: projection.bias: Input should be an instance of Tensor"),
    (_no_number, "model: projection.bias holds values that are not finite"),
    (_set("model", None), "model: Input should be a valid dictionary"),
    (_set("optimizer", [1]), "optimizer: Input should be a valid dictionary"),
    (_set("optimizer", {}), "optimizer: it has no param_groups"),
    (_set("optimizer", {"param_groups": [], "state": {}}), "optimizer: it has 0 param_groups"),
    (_other_option, "optimizer: 'weight_decay' is 0.5, and must be 0"),
    (_momentum, "optimizer: it has a state, which SGD without momentum has not"),
    (_set("random", []), "random: of 0 processes, and must be of 1"),
    (_set("random", [{}]), "random: cpu is missing"),
    (_set("random", [{"cpu": torch.zeros(9, dtype=torch.uint8)}]), "random: cpu is uint8[9], and must be uint8["),
    (_set("random", [{"cpu": torch.zeros_like(torch.get_rng_state())}]), "Invalid mt19937 state"),
    (_set("epoch", "1"), "epoch: Input should be a valid integer"),
    (_set("epoch", 7), "its log is not that of 7 epochs"),
    (_set("log", "epoch"), "log: Input should be a valid list"),
    (_row_without_column, "log: 0: seconds: Field required"),
    (_text_in_row, "log: 0: train_perplexity: Input should be a valid number"),
    (_set("identity", [1]), "identity: Input should be a valid dictionary"),
    (_set("identity", {"seed": torch.zeros(3)}), "identity: seed: "),
]


def test_whole_checkpoint_with_broken_content(zaremba, trained: Path) -> None:
    """One line that names the file and what is wrong in it; no file is touched."""
    file = trained / "checkpoint.pt"
    whole = file.read_bytes()
    for damage, told in BROKEN:
        state = torch.load(io.BytesIO(whole), weights_only=True)
        damage(state)
        torch.save(state, file)
        before = contents(trained)
        said = refusal(zaremba("--resume", status=2))
        assert said.startswith(f"{file} is broken ({told}")
        assert said.endswith("; it was left as it is: move it away, or put a good copy there")
        assert contents(trained) == before
    file.write_bytes(whole)
    assert zaremba("--resume") == ""


@pytest.mark.parametrize("form", ["2.2", "later"])
def test_checkpoints_of_other_versions_of_torch(zaremba, trained: Path, form: str) -> None:
    """The options of SGD are not the same in all, and some note that there is no momentum."""
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    if form == "2.2":
        group.pop("fused", None)
        state["optimizer"]["state"] = {i: {"momentum_buffer": None} for i in group["params"]}
    else:
        group["another"] = None
    torch.save(state, trained / "checkpoint.pt")
    assert zaremba("--resume") == ""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be a whole number from 1 to 2**63 - 1, got 'x'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number from 1 to 2**63 - 1, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1 to 2**63 - 1, got '0'"),
        ({"RANK": "first"}, "RANK must be a whole number from 0 to 2**63 - 1, got 'first'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number from 0 to 2**63 - 1, got '-1'"),
        ({"RANK": "9" * 5000}, "RANK must be a whole number from 0 to 2**63 - 1, got '999"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the 2 processes did not find each other: "),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "the 2 processes did not"),
    ],
)
def test_wrong_variables_of_torchrun(
    zaremba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refusal(zaremba(status=2)).startswith(said)
    assert not (tmp_path / "run").exists()


def test_rank_beyond_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UsageError, match="RANK must be less than WORLD_SIZE, which is 2, got 2"):
        Variables.read()


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


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mode", "x"), "mode must be one of random, nr_st, nr_rh_st, got 'x'"),
        (("--epochs", 3), "--epochs 3: the schedule ends after 2; --set epochs=3 extends it"),
        (("--device", "tpu"), "--device tpu: must be cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device cuda:99: "),
        (("--device", "cpu:3"), "--device cpu:3: must be cpu, cuda or cuda:N"),
        (("--device", "cuda:" + "9" * 500), "--device cuda:999"),
        # With so many, OpenMP ended in a segmentation fault.
        (("--threads", 100_000), "--threads 100000: this machine has "),
        (("--threads", 10**20), "--threads 100000000000000000000: this machine has "),
        (("--seed", 10**20), "seed must be a whole number from 0 to 2**63 - 1, got 100000000000000000000"),
        (("--epochs", "9" * 4000), "--epochs a number of about 4,000 digits: the schedule ends after 2"),
        (("--out", "x" * 5000), "xxx"),
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


def test_diverging_training_stops_and_keeps_what_it_had(
    zaremba, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(trained)

    def leave_the_numbers(optimizer: torch.optim.SGD) -> None:
        optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.SGD, "step", leave_the_numbers)
    assert refusal(zaremba("--resume", status=1)).startswith("epoch 2: the loss is no longer finite")
    assert contents(trained) == before


def test_interruption(zaremba, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = contents(trained)
    monkeypatch.setattr(torch.optim.SGD, "step", interrupt)
    assert refusal(zaremba("--resume", status=130)).startswith("interrupted; --resume continues")
    assert contents(trained) == before
    monkeypatch.undo()
    # In the middle of a save, and in the first epoch.
    monkeypatch.setattr(os, "fsync", interrupt)
    assert refusal(zaremba("--resume", status=130)).startswith("interrupted; --resume continues")
    assert contents(trained) == before
    said = refusal(zaremba("--out", trained.with_name("other"), status=130))
    assert said == "interrupted; no epoch was finished"
    assert not trained.with_name("other").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_out_of_memory(zaremba, trained: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    before = contents(trained)
    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    assert refusal(zaremba("--resume", status=2)).startswith("out of memory: ")
    assert contents(trained) == before


def test_step_that_no_memory_holds(zaremba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough for the parameters, of which there are 41,709, but not for gradients of them.
    monkeypatch.setattr(zaremba_main, "memory", lambda: 200_000)
    said = refusal(zaremba("--set=hidden_size=50", status=2))
    assert re.fullmatch(
        r"a model with hidden_size 50 and num_layers 2, its gradients and a step of 8 words needs 0.00031\d GiB, "
        r"and this machine has 0.000186 GiB",
        said,
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(zaremba_main, "memory", lambda: 400_000)
    assert zaremba("--set=hidden_size=50", "--epochs", 1) == ""


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


@pytest.mark.parametrize("module", ["pydantic", "typer", "rich", "yaml", "sd_plugin"])
def test_what_it_needs_is_said_in_a_line(without, module: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "zaremba_main.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=without(module))
    assert done.returncode == 2
    assert done.stderr == "zaremba_main.py needs sd-plugin, pydantic, typer, rich and PyYAML: pip install '.[demo]'\n"
