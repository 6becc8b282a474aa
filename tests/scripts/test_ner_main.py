"""``ner_main.py`` and what it is made of, on the stand-in for targer."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Without it the scripts end at once, and would end pytest.
pytest.importorskip("pydantic")
import host_launcher
import ner_data
import ner_main
import ner_scores
import torch
from hypothesis import given
from hypothesis import strategies as st
from ner_measurement import Epoch, LayerTimer, Log
from torch import Tensor, nn

from sd_plugin import UsageError

from ..environ import clean
from ..forks import Forks
from ..patches import targer_stand_in as stand_in
from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("train", "dev", "test")

# ------------------------------------------------------------------------------------------------ the text


def corpus(folder: Path, **parts: str) -> dict[str, Path]:
    """The files of a corpus; a part that is not given has one sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        (folder / f"{part}.txt").write_text(parts.get(part, "EU NNP B-NP B-ORG\n"), encoding="utf-8")
    return ner_data.find(folder, folder)


def test_corpus_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    corpus(tmp_path / "data" / "conll2003")
    assert ner_data.find(None, checkout)["dev"] == tmp_path / "data" / "conll2003" / "dev.txt"
    own = checkout / "data" / "NER" / "CoNNL_2003_shared_task"
    corpus(own)
    assert ner_data.find(None, checkout)["dev"] == own / "dev.txt"
    corpus(tmp_path / "named")
    assert ner_data.find(Path("named"), checkout)["dev"] == tmp_path / "named" / "dev.txt"


def test_missing_corpus(tmp_path: Path) -> None:
    corpus(tmp_path / "data")
    (tmp_path / "data" / "dev.txt").unlink()
    with pytest.raises(UsageError, match=r"has no dev\.txt: name a folder with CoNLL-2003 by --data"):
        ner_data.find(tmp_path / "data", tmp_path)


def test_tokens(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER"
    path = corpus(tmp_path, train=text)["train"]
    assert list(ner_data.tokens(path)) == [("EU", "B-ORG"), ("rejects", "O"), None, ("Peter", "B-PER"), None]
    assert ner_data.count_sentences(path) == 2
    assert ner_data.count_sentences(corpus(tmp_path, train="\n\n")["train"]) == 0


@pytest.mark.parametrize("line", ["EU", "EU\tNNP\tB-ORG", "EU NNP B-NP ORG", "EU NNP B-NP B-"])
def test_other_text_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = corpus(tmp_path, train=f"EU NNP B-NP B-ORG\n\n{line}\n")["train"]
    with pytest.raises(UsageError, match="line 3: expected a word and, last, a tag"):
        ner_data.count_sentences(path)


def test_other_encoding_is_refused(tmp_path: Path) -> None:
    path = corpus(tmp_path)["train"]
    path.write_bytes(b"\xff\xfe B-ORG\n")
    with pytest.raises(UsageError, match=r"train\.txt cannot be read \(UnicodeDecodeError\)"):
        ner_data.count_sentences(path)


def test_vectors(tmp_path: Path) -> None:
    files = corpus(tmp_path, train="The X O\ncat X O\n\nthe X O\n", dev="Cat X O\nsat X O\n", test="12 X O\n")
    target = tmp_path / "vectors.txt"
    assert ner_data.write_vectors(files, target, 50, 3) == 4
    rows = [line.split(" ") for line in target.read_text().splitlines()]
    assert [row[0] for row in rows] == ["the", "cat", "sat", "12"]
    values = torch.tensor([[float(x) for x in row[1:]] for row in rows])
    assert values.shape == (4, 50)
    bound = math.sqrt(3 / 50)
    assert 0.9 * bound < values.abs().max() <= bound + 1e-6
    assert values.var().item() == pytest.approx(1 / 50, rel=0.2)

    again, other = tmp_path / "again.txt", tmp_path / "other.txt"
    ner_data.write_vectors(files, again, 50, 3)
    ner_data.write_vectors(files, other, 50, 4)
    assert again.read_bytes() == target.read_bytes() != other.read_bytes()


# ------------------------------------------------------------------------------------------------- the time


class Work(torch.autograd.Function):
    """The identity; it takes a fixed time forward and another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Any, forward: float, backward: float) -> Tensor:
        clock.now += forward
        ctx.clock, ctx.backward_s = clock, backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.now += ctx.backward_s
        return dy, None, None, None


class Layer(nn.Module):
    """Two branches and a weight, so that the engine has a choice of what to do next."""

    def __init__(self, clock: Any) -> None:
        super().__init__()
        self.clock, self.weight = clock, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = Work.apply(self.weight, self.clock, 0.0, 4.0)
        return Work.apply(x * weight, self.clock, 1.0, 2.0) + Work.apply(x, self.clock, 10.0, 20.0)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, LayerTimer, Layer]:
    clock = SimpleNamespace(now=0.0)
    timer = LayerTimer(lambda: clock.now)
    monkeypatch.setattr(Layer, "forward", timer.around(Layer.forward))
    return clock, timer, Layer(clock)


def test_layer_is_timed_in_both_directions_and_nothing_else(timed: tuple[Any, LayerTimer, Layer]) -> None:
    clock, timer, layer = timed
    parameter, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    for step in (1, 2):
        beside = Work.apply(other, clock, 1000.0, 1000.0)
        x = Work.apply(parameter, clock, 1000.0, 1000.0)
        y = layer(x, torch.ones(3))
        loss = (Work.apply(y, clock, 1000.0, 1000.0) * beside).sum()
        assert (timer.forward_s, timer.backward_s) == (11.0 * step, 26.0 * (step - 1))
        loss.backward()
        assert (timer.forward_s, timer.backward_s) == (11.0 * step, 26.0 * step)
    timer.reset()
    assert (timer.forward_s, timer.backward_s) == (0.0, 0.0)


def test_only_training_is_timed(timed: tuple[Any, LayerTimer, Layer]) -> None:
    _, timer, layer = timed
    x = torch.ones(3, requires_grad=True) * 1
    layer.eval()
    layer(x, x).sum().backward()
    layer.train()
    with torch.no_grad():
        layer(x, x)
    assert (timer.forward_s, timer.backward_s) == (0.0, 0.0)


def test_backward_pass_whose_end_cannot_be_seen(timed: tuple[Any, LayerTimer, Layer]) -> None:
    _, timer, layer = timed
    layer(torch.ones(3), torch.ones(3)).sum().backward()
    assert (timer.forward_s, timer.backward_s) == (11.0, None)


def rows(*backward: float | None) -> list[Epoch]:
    return [
        Epoch(
            epoch=k,
            train_loss=1.0,
            train_f1=2.0,
            dev_f1=3.0,
            test_f1=4.0,
            batches=10 * (k > 0),
            training_s=8.0 * (k > 0),
            evaluation_s=5.0,
            lstm_forward_s=1.0 * (k > 0),
            lstm_backward_s=seconds,
        )
        for k, seconds in enumerate(backward)
    ]


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        ([], "no epoch was trained"),
        (rows(0.0), "no epoch was trained"),
        (rows(0.0, 2.0, 4.0), "training 8.00 s an epoch (mean of 2), of which the BiLSTM: 1.00 s forward, 3.00 s "),
        (rows(0.0, None), "1.00 s forward; no gradient reaches its input"),
    ],
)
def test_summary_of_times(tmp_path: Path, epochs: list[Epoch], told: str) -> None:
    log = Log(tmp_path / "epochs.csv")
    log.rows = epochs
    assert told in log.summary()
    if "3.00 s" in told:
        assert log.summary().endswith("backward (50%)")


# ----------------------------------------------------------------------------------------------- the scores

tags = st.sampled_from(["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
pairs = st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=8), min_size=1, max_size=6)


def split(sentences: list[list[tuple[str, str]]]) -> tuple[list[list[str]], list[list[str]]]:
    return [[a for a, _ in s] for s in sentences], [[b for _, b in s] for s in sentences]


def span_f1(targets: list[list[str]], outputs: list[list[str]]) -> float:
    """F1 in percent from sets of spans, written out."""

    def spans(sentences: list[list[str]]) -> set[tuple[int, int, int, str]]:
        found = set()
        for n, sentence in enumerate(sentences):
            begin = None
            for t, tag in enumerate([*sentence, "O"]):
                goes_on = begin is not None and tag == f"I-{sentence[begin][2:]}"
                if begin is not None and not goes_on:
                    found.add((n, begin, t, sentence[begin][2:]))
                if not goes_on:
                    begin = None if tag == "O" else t
        return found

    a, b = spans(targets), spans(outputs)
    return 200 * len(a & b) / (len(a) + len(b)) if a | b else 0.0


@given(sentences=pairs)
def test_seqeval_counts_entities(sentences: list[list[tuple[str, str]]]) -> None:
    pytest.importorskip("seqeval")
    targets, outputs = split(sentences)
    assert ner_scores.seqeval_f1(targets, outputs) == pytest.approx(span_f1(targets, outputs))


def test_agreement_is_that_of_two_digits() -> None:
    assert ner_scores.Score(10.62, 10.625).agrees
    assert ner_scores.Score(10.63, 10.625).agrees
    assert not ner_scores.Score(10.62, 10.64).agrees
    assert ner_scores.Score(10.62, None).agrees


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    assert ner_scores.seqeval_f1([["O"]], [["O"]]) is None
    assert "not by seqeval, which is not installed" in str(ner_scores.Score(1.5, None))


# ---------------------------------------------------------------------------------------------- the program

Launch = Callable[..., subprocess.CompletedProcess[str]]
#: What a dry run says of the original: only how its files are read and written changes.
FILES_ONLY = ["  torch.load", "  torch.save", "  __main__.open"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.copy(tmp_path_factory.mktemp("hosts") / "targer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def launch(tmp_path: Path, checkout: Path, data: Path, fork: Forks) -> Launch:
    """Runs ``ner_main.py`` in an empty folder, on the stand-in and its corpus unless told otherwise."""
    # The stand-in scores without Perl, which need not be installed here.
    perl = tmp_path / "bin" / "perl"
    perl.parent.mkdir()
    perl.write_text("#!/bin/sh\n")
    perl.chmod(0o755)
    kept = clean("TARGER", "PYTHON")
    folder = tmp_path / "here"
    folder.mkdir()

    def run(
        *arguments: object, host: Path | None = None, started: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        given = list(map(str, arguments))
        if not any(argument.startswith("--data") for argument in given):
            given.append(f"--data={data}")
        if host is None and "TARGER_DIR" not in variables:
            host = checkout
        if host:
            given.append(f"--targer-dir={host}")
        script = ROOT / "scripts" / "ner_main.py"
        env = {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{os.environ['PATH']}:{perl.parent}", **variables}
        if not started:
            return fork(script, given, cwd=folder, env={**env, "PYTHONHASHSEED": "0"})
        return subprocess.run(
            [sys.executable, str(script), *given], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE
        )

    return run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def results(folder: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """What ``epochs.csv`` and ``result.json`` hold."""
    with (folder / "epochs.csv").open() as file:
        epochs = list(csv.DictReader(file))
    return epochs, json.loads((folder / "result.json").read_text())


def scores_of(epochs: list[dict[str, str]]) -> list[list[str]]:
    """The rows without times."""
    return [[value for name, value in row.items() if not name.endswith("_s")] for row in epochs]


@pytest.mark.parametrize("mode", [None, "random", "nr_st", "nr_rh_st"])
def test_training(launch: Launch, tmp_path: Path, checkout: Path, mode: str | None) -> None:
    before = contents(checkout)
    sd = [] if mode is None else ["--sd"] if mode == "nr_rh_st" else [f"--sd={mode}"]
    done = launch(*sd, "--epoch-num", 2, "--run-dir=made/here")
    assert done.returncode == 0, done.stderr
    assert contents(checkout) == before, "the checkout is only read"
    folder = tmp_path / "here" / "made" / "here"
    made = {"conlleval", "epochs.csv", "random_vectors.txt", "report.txt", "result.json", "tagger.hdf5"}
    assert {path.name for path in folder.iterdir()} == made
    assert "random vectors" in done.stderr

    epochs, result = results(folder)
    assert [row["epoch"] for row in epochs] == ["0", "1", "2"]
    assert [row["batches"] for row in epochs] == ["0", "4", "4"]
    times = {name: [float(row[name]) for row in epochs] for name in epochs[0] if name.endswith("_s")}
    for name in ("training_s", "lstm_forward_s", "lstm_backward_s"):
        assert times[name][0] == 0 < min(times[name][1:]), name
    for whole, *parts in zip(*(times[n] for n in ("training_s", "lstm_forward_s", "lstm_backward_s")), strict=True):
        assert sum(parts) <= whole
    told = (folder / "report.txt").read_text().splitlines()
    assert [float(row.split()[1]) / 100 for row in told] == pytest.approx(
        [float(row["train_loss"]) for row in epochs], abs=1e-5
    )
    assert [row.split()[2:] for row in told] == [[row["train_f1"], row["dev_f1"], row["test_f1"]] for row in epochs]

    assert result["mode"] == (mode or "original")
    assert [row["dev_f1"] for row in result["epochs"]] == [float(row["dev_f1"]) for row in epochs]
    last = result["epochs"][-1]
    assert result["scores"]["dev"]["conlleval"] == last["dev_f1"] > 30, "it learned something, and the saved one is it"
    assert result["scores"]["test"]["conlleval"] == last["test_f1"]
    assert f"F1 of the saved model on dev: {last['dev_f1']:.2f} conlleval" in done.stdout
    sites = [line.split() for line in result["report"] if line.startswith("  birnn")]
    structured = {"nr_st": 1, "nr_rh_st": 3}
    assert len(sites) == structured.get(mode or "", 0)
    assert all(site[1] == "8" and site[-1] == "0" for site in sites), "every pattern was used"
    if mode in structured:
        assert "hints lost" in done.stdout


def test_same_command_gives_the_same_model(launch: Launch, tmp_path: Path) -> None:
    command = ("--sd=nr_st", "--epoch-num=1", "--seed-num=5")
    # Started as a user does, with an order of sets that differs from start to start; and with a fixed one.
    for name, started in (("one", True), ("two", False)):
        assert launch(*command, f"--run-dir={name}", started=started).returncode == 0
    one, two = (results(tmp_path / "here" / name)[0] for name in ("one", "two"))
    assert scores_of(one) == scores_of(two)


def test_saved_model_is_loaded_with_and_without_the_plugin(launch: Launch, tmp_path: Path) -> None:
    here = tmp_path / "here"
    assert launch("--sd", "--epoch-num=1", "--save=model").returncode == 0
    (run,) = (here / "run").iterdir()
    assert re.fullmatch(r"ner_nr_rh_st_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    saved, _ = results(run)
    assert (here / "model").is_file()

    vectors = run / "random_vectors.txt"
    for name, arguments, variables in (("a", ("--sd",), {}), ("b", (), {"SD_PLUGIN": "0"})):
        # Paths are those of the folder the program is started in.
        given = (f"--emb-fn={vectors.relative_to(here)}", "--load=model", "--epoch-num=0", f"--run-dir={name}")
        done = launch(*arguments, *given, **variables)
        assert done.returncode == 0, done.stderr
        (epoch,), result = results(here / name)
        assert [epoch[part] for part in ("dev_f1", "test_f1")] == [saved[-1][part] for part in ("dev_f1", "test_f1")]
        assert result["vectors"] == str(vectors.relative_to(here))
        assert not (here / name / "random_vectors.txt").exists()
        assert "no epoch was trained" in done.stdout


def test_damaged_model_is_one_line(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "here" / "model").write_bytes(b"nothing of the kind")
    done = launch("--load=model", "--epoch-num=0")
    assert done.returncode == 2
    assert re.match(r"error: .*model is damaged, or no file of targer", done.stderr.splitlines()[-1])
    # What was prepared is no result: the folder that was made for it is gone.
    assert os.listdir(tmp_path / "here") == ["model"]


def test_what_the_model_does_not_read_need_not_fit(
    checkout: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models without characters take no notice of their sizes, nor does a saved tagger, which has its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ner_main.shutil, "which", lambda name: f"/bin/{name}")
    (tmp_path / "model").touch()
    wide = ["--char-window-size=100000", f"--data={data}"]
    for arguments in ([*wide, "--model=BiRNNCRF"], [*wide, "--load=model"]):
        options, rest = ner_main.parser().parse_known_args(arguments)
        assert ner_main.plan(options, ner_main.read_numbers(options, rest), rest, None, checkout).files
    options, rest = ner_main.parser().parse_known_args([*wide, "--model=BiRNNCNN"])
    with pytest.raises(UsageError, match="--char-window-size 100000: a word has 20 characters"):
        ner_main.plan(options, ner_main.read_numbers(options, rest), rest, None, checkout)


def test_more_threads_than_processors_are_not_used(launch: Launch, tmp_path: Path) -> None:
    """With so many OpenMP would end the process; MKL, where torch has it, bounds them unless told otherwise."""
    done = launch("--epoch-num=1", "--run-dir=made", started=True, OMP_NUM_THREADS="100000", MKL_DYNAMIC="FALSE")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "here" / "made")[1]["threads"] == os.cpu_count()
    assert "note: OMP_NUM_THREADS asked for 100,000 threads, and this machine has " in done.stderr


def test_dry_run_tells_and_writes_nothing(launch: Launch, tmp_path: Path, checkout: Path) -> None:
    before = contents(checkout)
    done = launch("--sd=nr_st", "--sd-dry-run")
    assert done.returncode == 0, done.stderr
    first, *changes = done.stdout.splitlines()
    assert str(checkout) in first and "mode nr_st, case III" in first and "recurrent dropout: none" in first
    assert "  src.layers.layer_bilstm.LayerBiLSTM.forward" in changes
    assert "  src.models.tagger_birnn_cnn_crf.TaggerBiRNNCNNCRF._forward_birnn" in changes
    assert {change.split(".")[0].strip() for change in changes} == {"src", "torch", "__main__"}
    assert launch("--sd-dry-run").stdout.splitlines()[1:] == FILES_ONLY
    assert contents(checkout) == before
    assert not list((tmp_path / "here").iterdir())


def test_options_of_the_dropout(launch: Launch) -> None:
    options = ("--sd-case=IV", "--sd-recurrent-dropout=0.25", "--sd-dry-run")
    first = launch("--sd", *options).stdout.splitlines()[0]
    assert "mode nr_rh_st, case IV" in first and "recurrent dropout: 0.25" in first


@pytest.fixture
def refused(
    tmp_path: Path, checkout: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What ``ner_main.py`` says when it refuses, run in this process, since nothing of the host runs."""
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.setattr(ner_main.shutil, "which", lambda name: f"/bin/{name}")
    for name in [name for name in os.environ if name.startswith(("SD_PLUGIN", "TARGER"))]:
        monkeypatch.delenv(name)
    # What the program itself sets is taken away again.
    monkeypatch.setenv("SD_PLUGIN", "")
    monkeypatch.delenv("SD_PLUGIN")

    def run(*arguments: object) -> str:
        given = [f"--targer-dir={checkout}", *map(str, arguments)]
        if not any(argument.startswith("--data") for argument in given):
            given.append(f"--data={data}")
        monkeypatch.setattr(sys, "argv", ["ner_main.py", *given])
        status = host_launcher.told_in_one_line(ner_main.main)
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), err
        (line,) = err.splitlines()
        return line

    return run


def fails(done: subprocess.CompletedProcess[str]) -> str:
    """See that the program refused in one line, and return that line."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sd=fast"], "--sd must be one of random, nr_st, nr_rh_st, got 'fast'"),
        (["--sd", "--sd-case=V"], "case must be one of I, II, III, IV, got 'V'"),
        (["--sd=random", "--sd-case=III"], "mode random has the cases I and II, not III"),
        (["--sd-case=III"], "--sd-case has no effect without --sd"),
        (["--sd-recurrent-dropout=0.5"], "--sd-recurrent-dropout has no effect without --sd"),
        (["--sd=nr_st", "--sd-recurrent-dropout=0.5"], "mode nr_st has no recurrent dropout"),
        (["--sd", "--rnn-type=GRU"], "--rnn-type GRU: here only LSTM"),
        (["--data-io=connl-pe"], "--data-io connl-pe: here only connl-ner-2003"),
        (["-v", "token-acc"], "--evaluator token-acc: here only f1-connl"),
        (["--epochs=3"], "unknown option --epochs: neither of this program nor of"),
        (["--data=nowhere"], r"nowhere has no train\.txt, dev\.txt, test\.txt: name a folder with CoNLL-2003"),
        (["--train=nowhere.txt"], "--train: there is no file nowhere.txt"),
        (["--emb-fn=nowhere.txt"], "--emb-fn: there is no file nowhere.txt"),
        (["-l", "nowhere.hdf5"], "--load: there is no file nowhere.hdf5"),
        (["--save=nowhere/model"], "--save: .*nowhere is no folder to write in"),
        (["--dropout-ratio=1"], "--dropout-ratio must be a finite number of at least 0 and below 1, got '1'"),
        (["--batch-size=100"], r"train\.txt has 40 sentences, and needs 100 at least"),
        (["--gpu=99"], "--gpu 99: torch sees [0-9]+ GPUs here"),
        # What the host would run into later, or never come out of.
        (["--batch-size=0"], r"--batch-size must be a whole number from 1 to 2\*\*63 - 1, got '0'"),
        (["-b", "-3"], r"--batch-size must be a whole number from 1 to 2\*\*63 - 1, got '-3'"),
        (
            ["--batch-size", "9" * 5000],
            r"--batch-size must be a whole number from 1 to 2\*\*63 - 1, got '9{20,40}\.",
        ),
        (["--emb-dim=0"], r"--emb-dim must be a whole number from 1 to 2\*\*63 - 1, got '0'"),
        (["--emb-dim=-1"], r"--emb-dim must be a whole number from 1 to 2\*\*63 - 1, got '-1'"),
        (
            ["--emb-dim=1000000000000"],
            "--emb-dim 1000000000000 --rnn-hidden-dim 100 needs .* GiB, and this",
        ),
        (["--seed-num=-1"], r"--seed-num must be a whole number from 0 to 2\*\*32 - 1, got '-1'"),
        (["-e-1"], r"--epoch-num must be a whole number from 0 to 2\*\*63 - 1, got '-1'"),
        (["--epoch-num=0"], "--epoch-num 0 trains nothing: it is for a saved tagger, to be evaluated: add --load FILE"),
        (["--min-epoch-num=-4"], r"--min-epoch-num must be a whole number from 0 to 2\*\*63 - 1, got '-4'"),
        (["-p", "-1"], r"--patience must be a whole number from 0 to 2\*\*63 - 1, got '-1'"),
        (["--gpu=-2"], r"--gpu must be a whole number from -1 to 2\*\*63 - 1, got '-2'"),
        (["--lr-decay=-0.1"], "--lr-decay must be a finite number of at least 0, got '-0.1'"),
        (["--momentum=1"], "--momentum must be a finite number of at least 0 and below 1, got '1'"),
        (["--char-window-size=100000"], "--char-window-size 100000: a word has 20 characters here; --word-len N makes"),
        (["--word-len=2"], "--char-window-size 3: a word has 2 characters here; --word-len N makes it N"),
        (["--word-len=1000000000000"], "--word-len 1000000000000 needs .* GiB, and this machine has"),
        (
            ["--char-cnn_filter-num=1000000000000"],
            "--char-embeddings-dim 25 --char-cnn_filter-num 1000000000000 --char-window-size 3 --rnn-hidden-dim",
        ),
        (["--dropout-ratio=nan"], "--dropout-ratio must be a finite number of at least 0 and below 1, got 'nan'"),
        (["--sd", "--sd-recurrent-dropout=x"], "--sd-recurrent-dropout must be a finite number .*, got 'x'"),
        (["--batch-size"], "argument --batch-size/-b: expected one argument"),
    ],
)
def test_wrong_use_is_one_line(refused: Callable[..., str], tmp_path: Path, arguments: list[str], told: str) -> None:
    line = refused(*arguments)
    assert re.search(told, line)
    assert len(line) < 400
    assert not list((tmp_path / "here").iterdir())


def test_wrong_folder(launch: Launch, tmp_path: Path) -> None:
    assert "nowhere is not a folder" in fails(launch(host=tmp_path / "nowhere"))
    assert "is not a checkout of targer" in fails(launch(host=tmp_path))
    assert "is not a checkout of targer" in fails(launch(TARGER_DIR=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("src/models/tagger_birnn_crf.py", "self.birnn_layer", "self.rnn", "does not use birnn_layer"),
        ("src/classes/report.py", "epoch, scores", "number, scores", "takes (self number scores)"),
    ],
)
@pytest.mark.parametrize("sd", ["--sd", "--epoch-num=1"])
def test_someone_elses_code(launch: Launch, tmp_path: Path, name: str, old: str, new: str, told: str, sd: str) -> None:
    other = stand_in.copy(tmp_path / "other")
    (other / name).write_text((other / name).read_text().replace(old, new))
    line = fails(launch(sd, host=other))
    assert f"{name} is not that of targer" in line and told in line


def test_results_are_not_overwritten(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "here" / "old"
    folder.mkdir()
    (folder / "epochs.csv").write_text("precious")
    assert "--run-dir: old holds the results of another run" in refused("--run-dir=old")
    assert (folder / "epochs.csv").read_text() == "precious"


def test_no_perl(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ner_main.shutil, "which", lambda name: None)
    assert "no perl is installed" in refused()


@pytest.mark.parametrize("arguments", [["--sd-dry-run"], []])
def test_no_numpy(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert refused(*arguments) == "error: numpy is not installed, which the original needs"


def test_environment_and_command_line_disagree(launch: Launch) -> None:
    assert "--sd, but SD_PLUGIN=0 switches the plugin off" in fails(launch("--sd", SD_PLUGIN="0"))
    done = launch("--sd-dry-run", SD_PLUGIN="nr_st")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:] == FILES_ONLY
    assert "SD_PLUGIN=nr_st has no effect here: without --sd this is the original" in done.stderr


def test_checkout_is_found_by_its_variable(launch: Launch, checkout: Path) -> None:
    done = launch("--sd-dry-run", TARGER_DIR=str(checkout))
    assert done.returncode == 0, done.stderr
    assert str(checkout) in done.stdout


def test_options_are_read_from_the_hosts_text(tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    path.write_text("parser.add_argument('--a', '-b', default='--no')\nother.add('--c')\nparser.add_argument('d')\n")
    assert ner_main.host_options(path) == {"--a", "-b"}
