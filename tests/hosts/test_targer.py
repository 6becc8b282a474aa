"""targer itself, unmodified, on a few sentences of CoNLL-2003: with structured dropout, without, and as it was saved.

Needs a checkout (``TARGER_DIR``, or ``../hosts/targer``) with its data folder, and Perl for the host's own scores.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkouts import checkout
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_plugin import hints, stats
from sd_plugin.patches import targer

from ..environ import clean
from ..patience import PATIENCE
from ..tolerances import assert_close, relative

pytestmark = [
    pytest.mark.hosts,
    # The host's regular expressions are no raw strings.
    pytest.mark.filterwarnings("ignore:invalid escape sequence", 'ignore:"\\\\d" is an invalid escape sequence'),
]

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 40, "dev": 10, "test": 10}


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkout("targer", "TARGER_DIR")


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first sentences of the three parts."""
    small = tmp_path_factory.mktemp("conll2003")
    for part, count in COUNTS.items():
        text = (folder / "data" / "NER" / "CoNNL_2003_shared_task" / f"{part}.txt").read_text(encoding="utf-8")
        sentences = [block for block in text.split("\n\n") if not block.startswith("-DOCSTART-")]
        (small / f"{part}.txt").write_text("\n\n".join(sentences[:count]) + "\n", encoding="utf-8")
    return small


def forget() -> None:
    for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
        del sys.modules[name]


@pytest.fixture
def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's modules can be imported, and nothing is written into its folder."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(folder))
    forget()
    stats.reset()
    yield
    targer.disable()
    stats.reset()
    forget()


# --------------------------------------------------------------------------------------- the host's classes

SENTENCES = [["EU", "rejects"], ["Peter", "Blackburn", "said", "so", "."], ["Germany"]]
TAGS = [["B-ORG", "O"], ["B-PER", "I-PER", "O", "O", "O"], ["B-LOC"]]
MODELS = ("BiRNN", "BiRNNCNN", "BiRNNCRF", "BiRNNCNNCRF")


def tagger(model: str, dropout: float, tmp_path: Path, rnn_type: str = "LSTM") -> Any:
    """A small tagger of the host's own."""
    import numpy as np
    from src.factories.factory_tagger import TaggerFactory
    from src.seq_indexers.seq_indexer_tag import SeqIndexerTag
    from src.seq_indexers.seq_indexer_word import SeqIndexerWord

    np.random.seed(3)  # noqa: NPY002 - what the host draws from
    torch.manual_seed(3)
    known = list(dict.fromkeys(word for sentence in SENTENCES for word in sentence))
    vectors = tmp_path / "vectors.txt"
    rows = (f"{word} {' '.join(f'{x:.4f}' for x in torch.randn(12).tolist())}\n" for word in known)
    vectors.write_text("".join(rows))
    words = SeqIndexerWord(gpu=-1, embeddings_dim=12)
    words.load_items_from_embeddings_file_and_unique_words_list(str(vectors), " ", False, known)
    tags = SeqIndexerTag(gpu=-1)
    tags.load_items_from_tag_sequences(TAGS)
    options = {
        "model": model,
        "batch_size": 3,
        "rnn_hidden_dim": 10,
        "freeze_word_embeddings": False,
        "dropout_ratio": dropout,
        "rnn_type": rnn_type,
        "gpu": -1,
        "freeze_char_embeddings": False,
        "char_embeddings_dim": 4,
        "word_len": 8,
        "char_cnn_filter_num": 3,
        "char_window_size": 3,
    }
    return TaggerFactory.create(type("Arguments", (), options), words, tags, TAGS).train()


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    model.train()
    model.zero_grad()
    loss = model.get_loss(SENTENCES, TAGS)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(result: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert result[0] == pytest.approx(expected[0], rel=relative(torch.float32))
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(result[1][name], gradient, name=name)


def test_checkout_is_the_one_that_is_known(folder: Path) -> None:
    assert targer.CHECKOUT.problem(folder) is None
    (finding,) = (f for f in targer.HOST.find({"TARGER_DIR": str(folder)}) if f.where == str(folder))
    assert finding.problem is None


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["random", "nr_st", "nr_rh_st"])
def test_nothing_dropped_and_evaluation_are_the_hosts(tmp_path: Path, model: str, mode: str) -> None:
    made = tagger(model, 0.0, tmp_path)
    expected = step(made)
    made.dropout.p = 0.5
    tags = made.predict_tags_from_words(SENTENCES, 3)
    targer.enable(mode)
    assert made.predict_tags_from_words(SENTENCES, 3) == tags
    made.dropout.p = 0.0
    assert_same(step(made), expected)
    assert not stats.sites()


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_dropped_units_are_skipped_rightly(
    tmp_path: Path, model: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tagger(model, 0.5, tmp_path)
    targer.enable(mode)
    skipped = step(made)
    sites = stats.sites()
    assert len(sites) == {"nr_st": 1, "nr_rh_st": 3}[mode]
    for name, site in sites.items():
        assert (site.drawn, site.lost) == (1, 0), name
        assert site.dropped / site.units == pytest.approx(0.5, abs=0.05), name
        assert site.skipped / site.dense == pytest.approx(0.5, abs=0.05), name
    monkeypatch.setattr(hints, "lookup", lambda tensor: None)
    assert_same(skipped, step(made))


@pytest.mark.usefixtures("on_path")
def test_other_layers_stay_stock(tmp_path: Path) -> None:
    made = tagger("BiRNNCNNCRF", 0.5, tmp_path, "GRU")
    expected = step(made)
    targer.enable()
    with pytest.warns(UserWarning, match="rnn_type GRU stays as it is"):
        assert_same(step(made), expected)


# ------------------------------------------------------------------------------------------ whole programs


def environment(**variables: str) -> dict[str, str]:
    kept = clean("TARGER", "PYTHON")
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **variables}


def launch(folder: Path, data: Path, here: Path, name: str, *arguments: str) -> tuple[list[dict[str, str]], Any, str]:
    """Run ``ner_main.py`` in ``here``: rows of its epochs, its result, and what it printed."""
    script = [sys.executable, str(ROOT / "scripts" / "ner_main.py"), f"--targer-dir={folder}", f"--data={data}"]
    done = subprocess.run(
        [*script, f"--run-dir={name}", *arguments],
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    with (here / name / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((here / name / "result.json").read_text()), done.stdout


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


needs_perl = pytest.mark.skipif(shutil.which("perl") is None, reason="the host scores with a Perl script")


@needs_perl
@pytest.mark.slow
def test_trains_saves_and_loads(folder: Path, data: Path, tmp_path: Path) -> None:
    before = contents(folder)
    rows, result, printed = launch(folder, data, tmp_path, "sd", "--sd", "-e", "1", "-b", "5", "--save-best", "no")
    assert contents(folder) == before
    sites = [line.split() for line in result["report"] if line.startswith("  birnn")]
    assert [(site[0], site[1], site[-1]) for site in sites] == [
        (name, "8", "0") for name in ("birnn.input", "birnn.l0.recurrent", "birnn.l0_reverse.recurrent")
    ]
    assert [row["batches"] for row in rows] == ["0", "8"]
    assert 0 < float(rows[1]["lstm_forward_s"]) + float(rows[1]["lstm_backward_s"]) < float(rows[1]["training_s"])
    assert result["scores"]["dev"]["conlleval"] == float(rows[1]["dev_f1"])
    assert "F1 of the saved model on test" in printed

    vectors = f"--emb-fn={tmp_path / 'sd' / 'random_vectors.txt'}"
    again, _, _ = launch(folder, data, tmp_path, "again", "--load=sd/tagger.hdf5", "-e", "0", vectors)
    assert [again[0][f"{part}_f1"] for part in COUNTS] == [rows[1][f"{part}_f1"] for part in COUNTS]
    trained, loaded = without_plugin(folder, *(tmp_path / name / "tagger.hdf5" for name in ("sd", "again")))
    assert trained == loaded


def without_plugin(folder: Path, *models: Path) -> list[str]:
    """Of each saved tagger, its tags for some sentences and a digest of its parameters.

    They are loaded in an interpreter that cannot import the plugin.
    """
    code = f"""if True:
        import hashlib, sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "sd_plugin":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        import torch
        for path in sys.argv[1:]:
            tagger = torch.load(path, weights_only=False)
            digest = hashlib.sha256()
            for name, value in tagger.state_dict().items():
                digest.update(name.encode() + value.numpy().tobytes())
            tags = tagger.predict_tags_from_words({SENTENCES}, 3)
            print("\\nresult", tags, digest.hexdigest())
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *map(str, models)],
        cwd=folder,
        env=environment(SD_PLUGIN="0"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    assert len(results) == len(models)
    return results


@needs_perl
@pytest.mark.slow
def test_without_sd_it_is_the_original(folder: Path, data: Path, tmp_path: Path) -> None:
    rows, result, _ = launch(folder, data, tmp_path, "launched", "-e", "1")
    assert result["mode"] == "original"
    # The same by hand, with nothing of this project.
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    shutil.copy(folder / "conlleval", by_hand)
    given = [f"--{part}={data / part}.txt" for part in COUNTS]
    vectors = f"--emb-fn={tmp_path / 'launched' / 'random_vectors.txt'}"
    command = [sys.executable, "-B", str(folder / "main.py"), *given, vectors, "--gpu=-1", "-e", "1"]
    done = subprocess.run(
        [*command, "--report-fn=report.txt", "--save=tagger"],
        cwd=by_hand,
        env=environment(SD_PLUGIN="0"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [
        re.findall(r"^ +\d+ \|.*", (path / "report.txt").read_text(), re.MULTILINE)
        for path in (by_hand, tmp_path / "launched")
    ]
    assert len(told[0]) == len(rows) == 2
    assert told[0] == told[1]
    trained, expected = without_plugin(folder, tmp_path / "launched" / "tagger.hdf5", by_hand / "tagger")
    assert trained == expected


# ---------------------------------------------------------------------------------------------- the scorers

tags = st.sampled_from(["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
pairs = st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=8), min_size=1, max_size=8)


@needs_perl
@settings(max_examples=25)
@given(sentences=pairs)
def test_seqeval_agrees_with_conlleval(folder: Path, sentences: list[list[tuple[str, str]]]) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    text = "".join("".join(f"word {a} {b}\n" for a, b in sentence) + "\n" for sentence in sentences)
    done = subprocess.run(
        ["perl", str(folder / "conlleval")], input=text, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    conlleval = float(done.stdout.splitlines()[1].rpartition(":")[2])
    targets, outputs = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    seqeval = 100 * metrics.f1_score(targets, outputs, zero_division=0)
    assert conlleval == pytest.approx(seqeval, abs=0.0051)
