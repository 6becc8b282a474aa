"""``zaremba_main.py`` as a program: what it computes, resumes, survives and shares between processes."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from .. import tolerances
from ..forks import Forks
from ..patience import PATIENCE

# Without these the script ends at once, and would end pytest.
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "zaremba_main.py"
MODES = ("random", "nr_st", "nr_rh_st")
HIDDEN, BATCH, STEPS, EPOCHS = 16, 4, 5, 3
UPDATES = EPOCHS * 21  # of a text of 60 lines of 7 words
NOISE = tolerances.of_training(torch.float32, UPDATES)
SMALL = {
    "hidden_size": HIDDEN,
    "batch_size": BATCH,
    "sequence_length": STEPS,
    "evaluation_batch_size": 3,
    "epochs": EPOCHS,
    "decay_after_epoch": 1,
    # So wide that it learns from the first step on.
    "init_range": 0.5,
    "learning_rate": 0.5,
    "dropout": 0.25,
    "seed": 7,
}
#: Columns of the log that differ between two runs of the same training.
TIMES = ("seconds", "words_per_second")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text in which a word tells something of the next."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(1)
    for part, lines in (("train", 60), ("valid", 15), ("test", 15)):
        words = (f"w{(start + 3 * i) % 11}" for start in rng.choices(range(11), k=lines) for i in range(6))
        lines_of = zip(*[words] * 6, strict=True)
        (folder / f"{part}.txt").write_text("".join(" ".join(line) + "\n" for line in lines_of))
    return folder


@pytest.fixture(scope="module")
def arguments(text: Path) -> Callable[..., list[str]]:
    """The command line of a small training into a folder."""

    def of(out: Path, *more: object, **changes: object) -> list[str]:
        sets = [f"--set={key}={value}" for key, value in {**SMALL, **changes}.items()]
        config = ROOT / "configs" / "zaremba_medium.yaml"
        return [str(config), f"--data={text}", f"--out={out}", *sets, *map(str, more)]

    return of


def environment(**more: str) -> dict[str, str]:
    """Like this process's, with one thread: numbers are compared bit by bit, and cores are few."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def zaremba(arguments: Callable[..., list[str]], fork: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program itself."""

    def run(out: Path, *more: object, **changes: object) -> Any:
        done = fork(SCRIPT, arguments(out, *more, **changes), cwd=Path.cwd(), env=environment())
        assert done.returncode == 0, done.stderr
        return done

    return run


Jobs = Callable[[list[list[dict[str, Any]]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def jobs(fork: Forks) -> Jobs:
    """Runs steps of zaremba_jobs.py."""

    def run(steps: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        program = Path(__file__).with_name("zaremba_jobs.py")
        done = fork(program, [json.dumps(steps)], cwd=Path.cwd(), env=environment())
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def whole(
    arguments: Callable[..., list[str]], jobs: Jobs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folders of trainings: uninterrupted and stopped after the first epoch, in each mode; and without dropout."""
    folder = tmp_path_factory.mktemp("whole")
    steps = []
    for mode in MODES:
        steps.append([{"arguments": arguments(folder / mode, "--mode", mode)}])
        steps.append([{"arguments": arguments(folder / f"{mode}, stopped", "--mode", mode, "--epochs", 1)}])
    steps.append([{"arguments": arguments(folder / "no dropout", dropout=0, evaluation_batch_size=1)}])
    results = jobs(steps)
    assert [result["status"] for result in results] == [0] * len(steps), results
    for mode, result in zip(MODES, results[:-1:2], strict=True):
        (folder / f"{mode}, output").write_text(result["output"])
    return lambda name: folder / name


def ranks(arguments: list[str], count: int = 2) -> list[dict[str, Any]]:
    """The jobs of a data-parallel training, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        {"arguments": arguments, "environment": {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}}
        for rank in range(count)
    ]


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same(out: Path, expected: Path) -> None:
    """Two folders hold the same training, bit by bit."""
    ours, theirs = checkpoint(out), checkpoint(expected)
    for key in ("identity", "epoch", "optimizer"):
        assert ours[key] == theirs[key]
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())
    for mine, other in zip(ours["random"], theirs["random"], strict=True):
        assert torch.equal(mine["cpu"], other["cpu"])
    assert without_times(ours["log"]) == without_times(theirs["log"])
    assert without_times(log(out)) == without_times(log(expected))


def assert_close(out: Path, expected: Path) -> None:
    """Two folders hold the same training, but for rounding."""
    ours, theirs = checkpoint(out)["model"], checkpoint(expected)["model"]
    tolerances.assert_close(ours, theirs, depth=UPDATES)
    for mine, other in zip(log(out), log(expected), strict=True):
        for column in ("train_perplexity", "valid_perplexity"):
            assert float(mine[column]) == pytest.approx(float(other[column]), rel=NOISE)


# ------------------------------------------------------------------------------------------ what it computes


def columns_of(text: Path, part: str, count: int) -> torch.Tensor:
    """The numbers of a part's words in columns, by a second implementation."""
    words = {name: (text / f"{name}.txt").read_text().replace("\n", " <eos> ").split() for name in ("train", part)}
    places = {word: place for place, (word, _) in enumerate(Counter(words["train"]).most_common())}
    numbers = [places[word] for word in words[part]]
    length = len(numbers) // count
    return torch.tensor([numbers[i * length : (i + 1) * length] for i in range(count)]).t()


class Plain(nn.Module):
    """Zaremba's model of PyTorch's own modules, without dropout."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, 2)
        self.projection = nn.Linear(HIDDEN, vocabulary)

    def losses(self, text: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """The loss of each word of columns but the first ones, ``[T, B]``."""
        y, state = self.lstm(self.embedding(text[:-1]), state)
        logits = self.projection(y)
        return nn.functional.cross_entropy(logits.transpose(1, 2), text[1:], reduction="none"), state


@pytest.mark.parametrize("mode", MODES)
def test_its_weights_are_those_of_plain_modules_and_its_perplexities_are_right(whole, text: Path, mode: str) -> None:
    out = whole(mode)
    state = checkpoint(out)["model"]
    model = Plain(len(state["embedding.weight"]))
    model.load_state_dict(state)
    result = json.loads((out / "result.json").read_text())
    for part in ("valid", "test"):
        with torch.no_grad():
            losses, _ = model.losses(columns_of(text, part, 3))
        noise = tolerances.relative(torch.float32)
        assert result[f"{part}_perplexity"] == pytest.approx(losses.double().mean().exp().item(), rel=noise)
    # It has learnt: of twelve words, the next one follows from this one but for the first of a line.
    assert result["valid_perplexity"] < 8


def test_it_descends_as_zaremba_does(zaremba, text: Path, tmp_path: Path) -> None:
    """Loss summed over columns and averaged over time, clipped, at the scheduled rate, the state carried over."""
    changes = {"dropout": 0, "max_grad_norm": 1.5, "learning_rate": 0.5}
    zaremba(tmp_path / "one", **changes)
    data = columns_of(text, "train", BATCH)
    torch.manual_seed(SMALL["seed"])
    model = Plain(12)
    # The order of the drawings: first those of the modules, then these.
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    clipped = 0
    for row in log(tmp_path / "one"):
        rate = 0.5 / 1.2 ** max(0, int(row["epoch"]) - 1)
        assert float(row["learning_rate"]) == pytest.approx(rate)
        state, told = None, []
        for start in range(0, (len(data) - 1) // STEPS * STEPS, STEPS):
            losses, state = model.losses(data[start : start + STEPS + 1], state)
            state = [part.detach() for part in state]
            gradients = torch.autograd.grad(losses.sum(1).mean(), list(model.parameters()))
            norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
            clipped += norm > 1.5
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= rate * min(1, 1.5 / norm) * gradient
            told.append(losses.detach().double())
        assert float(row["train_perplexity"]) == pytest.approx(torch.cat(told).mean().exp().item(), rel=NOISE)
    assert 0 < clipped < EPOCHS * len(told)
    assert len(told) * EPOCHS <= UPDATES
    tolerances.assert_close(checkpoint(tmp_path / "one")["model"], dict(model.state_dict()), depth=UPDATES)


@pytest.mark.parametrize("mode", MODES)
def test_log_and_output(whole, mode: str) -> None:
    rows = log(whole(mode))
    assert list(rows[0]) == [
        *("name", "mode", "seed", "epoch", "epochs", "learning_rate", "train_perplexity", "valid_perplexity"),
        *("seconds", "words_per_second", "skipped"),
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {(row["name"], row["mode"], row["seed"], row["epochs"]) for row in rows} == {
        ("zaremba_medium", mode, "7", "3")
    }
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.5, 0.5 / 1.2, 0.5 / 1.44])
    perplexities = [float(row["train_perplexity"]) for row in rows]
    assert perplexities == sorted(perplexities, reverse=True)
    assert all(float(row[column]) > 0 for row in rows for column in TIMES)
    # By hand: two layers with 4H·H each way, 12 words; a quarter of what follows a dropout is skipped.
    layer, projection = 4 * HIDDEN * HIDDEN, 12 * HIDDEN
    followed = {"random": 0, "nr_st": 2 * layer + projection, "nr_rh_st": 4 * layer + projection}[mode]
    share = 0.25 * followed / (4 * layer + projection)
    assert [float(row["skipped"]) for row in rows] == pytest.approx([share] * 3)

    output = whole(f"{mode}, output").read_text()
    assert len(re.findall(r"^epoch +\d of 3 .* perplexity: train +[\d.]+  valid +[\d.]+ .* words/s", output, re.M)) == 3
    assert re.search(r"^after epoch 3 of 3: test perplexity [\d.]+$", output, re.M)
    assert ("structured dropout report (backend: cpu)" in output) == (mode != "random")
    assert ("lstm.l1.recurrent" in output) == (mode == "nr_rh_st")
    assert "\x1b" not in output
    if mode != "random":
        # No hint was lost on the way: every site's last column.
        assert set(re.findall(r"^  (?:embedding|lstm|output)\S* .* (\d+)$", output, re.M)) == {"0"}


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("mode", MODES)
def test_resumed_training_is_bit_identical(whole, zaremba, tmp_path: Path, mode: str) -> None:
    shutil.copytree(whole(f"{mode}, stopped"), tmp_path / "run")
    first = checkpoint(tmp_path / "run")
    assert first["epoch"] == len(first["log"]) == len(log(tmp_path / "run")) == 1
    done = zaremba(tmp_path / "run", "--mode", mode, "--resume")
    assert "resumed after epoch 1" in done.stdout
    assert_same(tmp_path / "run", whole(mode))
    # What was compared is worth it: weights and generator did move on.
    last = checkpoint(tmp_path / "run")
    assert not torch.equal(first["model"]["lstm.weight_hh_l0"], last["model"]["lstm.weight_hh_l0"])
    assert not torch.equal(first["random"][0]["cpu"], last["random"][0]["cpu"])


#: Where to kill -9, in the second epoch -> how many epochs the checkpoint then has. An epoch has 20 steps; a save has
#: these calls: fsync, replace and fsync of the folder for the checkpoint, and the same for the log.
KILLS = {
    "in the middle of the epoch": ("step", 25, 1),
    "checkpoint not flushed": ("fsync", 5, 1),
    "checkpoint not renamed": ("replace", 3, 1),
    "checkpoint renamed": ("fsync", 6, 2),
    "log not flushed": ("fsync", 7, 2),
    "log not renamed": ("replace", 4, 2),
    "all renamed": ("fsync", 8, 2),
}


@pytest.fixture(scope="module")
def killed(arguments: Callable[..., list[str]], jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kill a folder where it was resumed, and in ``left`` a copy of what the kill had left."""
    folder, steps = tmp_path_factory.mktemp("killed"), []
    left = folder / "left"
    for name, (function, count, _) in KILLS.items():
        out = folder / name
        copy = [str(out), str(left / name)]
        steps.append([{"arguments": arguments(out), "kill": [function, count], "copy": copy}])
        steps.append([{"arguments": arguments(out, "--resume")}])
    out = folder / "first"
    steps.append([{"arguments": arguments(out), "kill": ["fsync", 1], "copy": [str(out), str(left / "first")]}])
    steps.append([{"arguments": arguments(out, "--resume")}])
    steps.append([{"arguments": arguments(out)}])
    results = jobs(steps)
    assert [result["status"] for result in results] == [-9, 0] * len(KILLS) + [-9, 2, 0], results
    assert "has no checkpoint.pt to resume" in results[-2]["output"]
    return folder


class TestKilled:
    @pytest.mark.parametrize("kill", KILLS)
    def test_files_are_whole(self, killed: Path, kill: str) -> None:
        left = killed / "left" / kill
        state, rows = checkpoint(left), log(left)
        assert state["epoch"] == KILLS[kill][2]
        # The log may lack the row of an epoch that was just saved, and never has a part of one.
        assert len(rows) in (state["epoch"], state["epoch"] - 1)
        assert all(None not in row and None not in row.values() for row in rows)

    @pytest.mark.parametrize("kill", KILLS)
    def test_resumed_as_if_nothing_had_happened(self, killed: Path, whole, kill: str) -> None:
        assert_same(killed / kill, whole("nr_rh_st"))
        assert sorted(os.listdir(killed / kill)) == ["checkpoint.pt", "log.csv", "result.json"]

    def test_before_the_first_checkpoint(self, killed: Path, whole) -> None:
        """There is nothing to resume, and nothing in the way of starting again."""
        partial, mark = sorted(os.listdir(killed / "left" / "first"))
        assert partial.startswith(".checkpoint.pt.partial-") and mark == ".no-result-yet"
        assert_same(killed / "first", whole("nr_rh_st"))


def test_log_follows_the_checkpoint(whole, zaremba, tmp_path: Path) -> None:
    """Whatever became of the log, resuming makes it what the checkpoint says, and trains nothing twice."""
    out = tmp_path / "run"
    shutil.copytree(whole("nr_rh_st"), out)
    (out / "log.csv").write_text("".join((out / "log.csv").read_text().splitlines(keepends=True)[:2]) + "zaremba_me")
    (out / ".checkpoint.pt.partial-12345678-9").write_bytes(b"half of a check")
    before = (out / "checkpoint.pt").read_bytes(), (out / "result.json").read_bytes()
    done = zaremba(out, "--resume", "--epochs", 1)
    assert done.stdout == f"nothing to do: {out / 'checkpoint.pt'} is of epoch 3, and epoch 1 is to be the last\n"
    assert ((out / "checkpoint.pt").read_bytes(), (out / "result.json").read_bytes()) == before
    assert_same(out, whole("nr_rh_st"))


def test_no_room_on_the_disk(whole, arguments, fork: Forks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole("nr_rh_st, stopped"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.path[0] = {str(SCRIPT.parent)!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = fork("-c", [program, *arguments(out, "--resume")], cwd=Path.cwd(), env=environment())
    assert done.returncode == 2
    assert done.stderr == f"error: {out / 'checkpoint.pt'}: File too large\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# -------------------------------------------------------------------------------------- several processes


@pytest.mark.exhaustive
def test_torchrun_without_dropout_equals_one_process(arguments, whole, tmp_path: Path) -> None:
    changes = {"dropout": 0, "evaluation_batch_size": 1}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    done = subprocess.run(
        [*launcher, *arguments(tmp_path / "two", **changes)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", whole("no dropout"))
    # One of them prints.
    assert done.stdout.count("test perplexity") == 1
    assert done.stdout.count("epoch  2 of 3") == 1
    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2


@pytest.fixture(scope="module")
def shared(arguments: Callable[..., list[str]], jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data-parallel trainings: NR+RH+ST, and the baseline, at one go and interrupted."""
    folder = tmp_path_factory.mktemp("processes")
    options = ("--mode", "random")
    results = jobs(
        [
            ranks(arguments(folder / "nr_rh_st")),
            ranks(arguments(folder / "random", *options)),
            ranks(arguments(folder / "resumed", *options, "--epochs", 1)),
            ranks(arguments(folder / "resumed", *options, "--resume")),
            ranks(arguments(folder / "odd", batch_size=3)),
            [{"arguments": arguments(folder / "random", *options, "--resume")}],
        ]
    )
    assert [result["status"] for result in results] == [0] * 8 + [2] * 3, results
    (folder / "odd, output").write_text("".join(result["output"] for result in results[8:10]))
    (folder / "alone, output").write_text(results[10]["output"])
    return folder


class TestProcesses:
    def test_structured_dropout_equals_one_process(self, shared: Path, whole) -> None:
        """All draw the same patterns, which are those that one process draws."""
        assert_close(shared / "nr_rh_st", whole("nr_rh_st"))
        first, second = checkpoint(shared / "nr_rh_st")["random"]
        assert torch.equal(first["cpu"], second["cpu"])

    def test_random_dropout_is_each_ones_own(self, shared: Path) -> None:
        first, second = checkpoint(shared / "random")["random"]
        assert not torch.equal(first["cpu"], second["cpu"])

    def test_resumed_training_is_bit_identical(self, shared: Path) -> None:
        assert_same(shared / "resumed", shared / "random")

    def test_other_number_of_processes_is_another_training(self, shared: Path) -> None:
        assert "of another training: processes was 2 and is 1;" in (shared / "alone, output").read_text()

    def test_batch_that_cannot_be_shared(self, shared: Path) -> None:
        said = (shared / "odd, output").read_text()
        assert said == "error: batch_size 3 cannot be shared equally by 2 processes\n"
        assert not (shared / "odd").exists()


@pytest.mark.exhaustive  # test_ner_main.py has the same, of the other program
def test_more_threads_than_processors_are_not_used(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """With so many OpenMP would end the process; MKL, where torch has it, bounds them unless told otherwise."""
    command = [sys.executable, str(SCRIPT), *arguments(tmp_path / "run", "--epochs", 1)]
    asked = environment(OMP_NUM_THREADS="100000", MKL_DYNAMIC="FALSE")
    done = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert f"; cpu, {os.cpu_count()} threads" in done.stdout
    told = f"this machine has {os.cpu_count()} processors: {os.cpu_count()} threads are used"
    assert f"note: OMP_NUM_THREADS asked for 100,000 threads, and {told}\n" in done.stderr


# ------------------------------------------------------------------------------------------------- curves


class TestCurves:
    SCRIPT = ROOT / "benchmarks" / "learning_curves.py"

    @pytest.fixture
    def draw(self, fork: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
        """Runs the program."""
        pytest.importorskip("matplotlib")
        return lambda *arguments: fork(self.SCRIPT, arguments, cwd=Path.cwd(), env=environment())

    def test_figure_of_the_logs(self, draw, whole, tmp_path: Path) -> None:
        logs = [whole(mode) / "log.csv" for mode in MODES]
        shortened = tmp_path / "shortened.csv"
        shortened.write_text("".join(logs[0].read_text().splitlines(keepends=True)[:3]).replace("_medium", "_large"))
        done = draw(*logs, shortened, "--out", tmp_path / "curves.svg")
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'curves.svg'}\n"), done.stderr
        assert sorted(os.listdir(tmp_path)) == ["curves.svg", "shortened.csv"]
        figure = (tmp_path / "curves.svg").read_text()
        for mode, name in zip(MODES, ("NR+Random", "NR+ST", "NR+RH+ST"), strict=True):
            assert f">{name}: {float(log(whole(mode))[-1]['valid_perplexity']):.2f}<" in figure
        assert ">Zaremba medium<" in figure and ">Zaremba large<" in figure
        assert f">NR+Random, 2 of 3 epochs: {float(log(whole('random'))[1]['valid_perplexity']):.2f}<" in figure

    def test_figure_of_pixels(self, whole, tmp_path: Path) -> None:
        """By the program as users start it."""
        pytest.importorskip("matplotlib")
        command = [
            sys.executable,
            str(self.SCRIPT),
            str(whole("nr_st") / "log.csv"),
            f"--out={tmp_path / 'curves.png'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_no_folder_is_made(self, draw, tmp_path: Path) -> None:
        done = draw(tmp_path / "x.csv", "--out", tmp_path / "new" / "folder" / "curves.svg")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("learning_curves.py: --out ")
        assert done.stderr.endswith(f"curves.svg: there is no folder {tmp_path / 'new' / 'folder'}\n")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("given", "culprit"), [(["x.csv"], "--out"), (["--out", "x.png"], "LOG.csv"), (["--nonsense"], "--nonsense")]
    )
    def test_a_wrong_command_line_is_told_in_a_line(self, draw, given: list[str], culprit: str) -> None:
        done = draw(*given)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and culprit in line

    def test_what_a_killed_run_left_is_removed_by_the_next_one(self, draw, fork: Forks, whole, tmp_path: Path) -> None:
        program = "import sys; from sd_plugin.kernels import leftovers; print(leftovers.partial(sys.argv[1]))"
        killed = fork("-c", [program, tmp_path / ".curves.png"], cwd=tmp_path, env=environment())
        Path(killed.stdout.strip()).write_text("half of a figure")
        done = draw(whole("nr_st") / "log.csv", "--out", tmp_path / "curves.png")
        assert done.returncode == 0, done.stderr
        assert os.listdir(tmp_path) == ["curves.png"]

    @pytest.mark.parametrize(
        ("content", "reason"), [("a,b\n1,2\n", "it has no column 'name'"), ("name,mode\n", "it has no rows")]
    )
    def test_what_is_no_log(self, draw, tmp_path: Path, content: str, reason: str) -> None:
        (tmp_path / "x.csv").write_text(content)
        done = draw(tmp_path / "x.csv", "--out", tmp_path / "curves.png")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"learning_curves.py: {tmp_path / 'x.csv'} is no log of zaremba_main.py ({reason})\n"
        assert not (tmp_path / "curves.png").exists()
