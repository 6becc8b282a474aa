"""OpenNMT-py's own console scripts with the plugin, on the first thousand sentence pairs of Multi30k.

Needs OpenNMT-py and this project installed, and the data: ``data/multi30k`` (scripts/get_data.py makes it), or
``multi30k.tar.xz`` in the folder that ``SD_PLUGIN_TEST_DATA`` names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ..environ import clean
from ..more import more
from ..patience import PATIENCE

pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DATA = Path(os.environ.get("SD_PLUGIN_TEST_DATA") or ROOT.parent / "shared" / "data")
ARCHIVE = DATA / "multi30k.tar.xz"
SMALL = {
    "save_data": "samples",
    "src_vocab": "vocab.de",
    "tgt_vocab": "vocab.en",
    "data": {
        "train": {"path_src": "train.de", "path_tgt": "train.en", "transforms": ["filtertoolong"], "weight": 1},
        "valid": {"path_src": "valid.de", "path_tgt": "valid.en", "transforms": []},
    },
    "encoder_type": "sd_brnn",
    "decoder_type": "sd_rnn",
    "rnn_type": "LSTM",
    "layers": 2,
    "hidden_size": 64,
    "word_vec_size": 64,
    "dropout": [0.3],
    "attention_dropout": [0.0],
    "batch_type": "sents",
    "batch_size": 32,
    "optim": "adam",
    "learning_rate": 0.003,
    "train_steps": 60,
    "valid_steps": 30,
    "save_checkpoint_steps": 30,
    "report_every": 10,
    "seed": 3,
    "num_workers": 0,
    "bucket_size": 1000,
    "world_size": 1,
    "gpu_ranks": [],
}

if not (BIN / "onmt_train").exists():
    pytest.skip("onmt_train is not beside this Python", allow_module_level=True)
if not list(Path(torch.__file__).parents[1].glob("sd_plugin*.dist-info")):
    pytest.skip("sd-plugin is not installed beside OpenNMT-py", allow_module_level=True)


def program(
    name: str, *arguments: str, folder: Path, plugin: str | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a console script of this environment in ``folder``, and demand its exit code."""
    environment = clean()
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if plugin is not None:
        environment["SD_PLUGIN"] = plugin
    command = [str(BIN / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a thousand training pairs, a hundred for validation, and their vocabulary."""
    folder = tmp_path_factory.mktemp("multi30k")
    prepared = ROOT / "data" / "multi30k"
    if not prepared.is_dir():
        if not ARCHIVE.exists():
            pytest.skip("no data/multi30k: set SD_PLUGIN_TEST_DATA to a folder with multi30k.tar.xz")
        script = [sys.executable, str(ROOT / "scripts" / "get_data.py"), "multi30k", "--from", str(ARCHIVE.parent)]
        subprocess.run([*script, "--out", str(folder / "data")], check=True, capture_output=True)
        prepared = folder / "data" / "multi30k"
    for split, count in (("train", 1000), ("valid", 100)):
        for language in ("de", "en"):
            lines = (prepared / f"{split}.{language}").read_text().splitlines(keepends=True)[:count]
            (folder / f"{split}.{language}").write_text("".join(lines))
    (folder / "few.de").write_text("".join((folder / "valid.de").read_text().splitlines(keepends=True)[:8]))
    config(folder, "vocab.yaml")
    program("onmt_build_vocab", "-config", "vocab.yaml", "-n_sample", "-1", folder=folder)
    return folder


def config(folder: Path, name: str, **changes: object) -> str:
    """Write a configuration; a change to None leaves the key out."""
    values = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(values))
    return name


def train(folder: Path, run: str, plugin: str | None = None, **changes: object) -> str:
    """Train into ``run_step_*.pt``; the log, also kept as ``run.log`` (the host loses its own ``log_file`` midway)."""
    name = config(folder, f"{run}.yaml", save_model=run, **changes)
    log = program("onmt_train", "-config", name, folder=folder, plugin=plugin).stderr
    (folder / f"{run}.log").write_text(log)
    return log


def perplexities(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"Validation perplexity: ([\d.]+)", log)]


def translation(
    folder: Path, *models: str, extra: tuple[str, ...] = ("-beam_size", "5"), plugin: str | None = None
) -> str:
    """Translate eight sentences; the text."""
    output = f"out.{len(list(folder.glob('out.*')))}"
    program(
        "onmt_translate", "-model", *models, "-src", "few.de", "-output", output, *extra, folder=folder, plugin=plugin
    )
    text = (folder / output).read_text()
    assert text.count("\n") == 8
    return text


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    """The corpus with a model trained by ``sd_brnn``/``sd_rnn``: ``sd_step_30.pt`` and ``sd_step_60.pt``."""
    train(corpus, "sd")
    return corpus


def test_training_learns_and_reports_what_it_skipped(trained: Path) -> None:
    log = (trained / "sd.log").read_text()
    first, last = perplexities(log)
    assert last < first < 600
    report = log[log.index("sd-plugin: structured dropout report") :]
    for site in ("encoder.embeddings", "encoder.rnn.l1_reverse.recurrent", "decoder.rnn.between", "decoder.output"):
        row = next(line for line in report.splitlines() if line.strip().startswith(site))
        # Patterns drawn, 29.7% of 64 units or 31.2% of 32 dropped and skipped, no hint lost.
        assert re.fullmatch(r"\s+\S+\s+\d+\s+(29\.7|31\.2)%\s+(29\.7|31\.2)%\s+0\s+0", row), row
    assert re.search(r"of [\d.]+ G multiply-adds of these products skipped \((29|30)\.\d%\)", report)


def test_resume_average_translate_release(trained: Path) -> None:
    log = train(trained, "more", train_from="sd_step_60.pt", train_steps=90)
    assert "sd-plugin: structured dropout report" in log
    # It goes on where it stopped: a start from scratch would be where the first training was after 30 steps.
    assert perplexities(log)[0] < perplexities((trained / "sd.log").read_text())[0]
    program("onmt_average_models", "-models", "sd_step_60.pt", "more_step_90.pt", "-output", "mean.pt", folder=trained)
    program("onmt_release_model", "--model", "mean.pt", "--output", "released.pt", folder=trained)
    one = translation(trained, "mean.pt")
    assert translation(trained, "released.pt") == one
    translation(trained, "sd_step_60.pt", "more_step_90.pt")


@pytest.mark.parametrize(
    "first", ["sd_plugin.opennmt.decoder", *more("onmt", "sd_plugin.opennmt", "sd_plugin.opennmt.to_stock")]
)
def test_any_import_order_registers_the_types(first: str, tmp_path: Path) -> None:
    code = f"import {first}; from onmt.encoders import str2enc; from onmt.decoders import str2dec; "
    code += "assert 'sd_rnn' in str2dec and 'sd_brnn' in str2enc"
    done = program("python", "-c", code, folder=tmp_path)
    assert "sd-plugin" not in done.stderr


def test_a_checkpoint_holds_nothing_of_the_plugin(trained: Path) -> None:
    raw = (trained / "sd_step_60.pt").read_bytes()
    assert b"sd_plugin" not in raw
    checkpoint = torch.load(trained / "sd_step_60.pt", weights_only=False)
    assert "rnn.weight_hh_l1_reverse" in "".join(checkpoint["model"])
    assert checkpoint["opt"].sd_mode == "nr_rh_st"


WITHOUT_PLUGIN = """
import argparse, sys, torch
class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sd_plugin":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPlugin())
sys.modules.pop("sd_plugin", None)
if hasattr(torch.serialization, "add_safe_globals"):  # the host alone cannot load any checkpoint on torch >= 2.6
    torch.serialization.add_safe_globals([argparse.Namespace])
from onmt.bin.translate import main
sys.argv[0] = "onmt_translate"
main()
assert not [name for name in sys.modules if name.startswith("sd_plugin.") and not name.startswith("sd_plugin._")]
"""


def translate_alone(folder: Path, model: str) -> str:
    """Translate eight sentences by OpenNMT-py in an interpreter that cannot import the plugin."""
    arguments = ["-model", model, "-src", "few.de", "-output", "alone", "-beam_size", "5"]
    environment = {**os.environ, "SD_PLUGIN": "0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, *arguments], cwd=folder, env=environment, check=True, timeout=PATIENCE
    )
    return (folder / "alone").read_text()


def test_to_stock_makes_a_checkpoint_for_opennmt_alone(trained: Path) -> None:
    program("sd-plugin", "to-stock", "sd_step_60.pt", "plain.pt", folder=trained)
    assert translate_alone(trained, "plain.pt") == translation(trained, "sd_step_60.pt")
    written = (trained / "plain.pt").read_bytes()
    (trained / "text.pt").write_text("no checkpoint")
    for arguments, told in (
        (("plain.pt", "again.pt"), "are OpenNMT-py's own already"),
        (("sd_step_60.pt", "plain.pt"), "plain.pt exists; --force replaces it"),
        (("gone.pt", "again.pt"), "no such file: gone.pt"),
        (("text.pt", "again.pt"), "is not a checkpoint"),
    ):
        done = program("sd-plugin", "to-stock", *arguments, folder=trained, code=2)
        assert told in done.stderr and done.stderr.count("\n") == 1
    assert not (trained / "again.pt").exists() and (trained / "plain.pt").read_bytes() == written


def test_an_override_checkpoint_translates_without_the_plugin(corpus: Path) -> None:
    log = train(corpus, "over", plugin="1", encoder_type="brnn", decoder_type="rnn")
    assert "sd-plugin: structured dropout report" in log
    with_plugin = translation(corpus, "over_step_60.pt", plugin="1")
    assert translate_alone(corpus, "over_step_60.pt") == with_plugin


def test_scoring_while_training_works_for_stock_and_structured_models(corpus: Path) -> None:
    short = {"train_steps": 4, "valid_steps": 4, "valid_metrics": ["BLEU"]}
    assert "validation BLEU" in train(corpus, "bleu", **short)
    assert "validation BLEU" in train(corpus, "bleu2", encoder_type="rnn", decoder_type="rnn", **short)


def test_a_stock_checkpoint_continues_with_structured_dropout(corpus: Path) -> None:
    stock = {"encoder_type": "rnn", "decoder_type": "rnn"}
    assert "sd-plugin" not in train(corpus, "s", train_steps=30, **stock)
    log = train(corpus, "s2", plugin="nr_st", train_from="s_step_30.pt", **stock)
    assert "sd-plugin: structured dropout report" in log
    assert "decoder.embeddings" in log and "recurrent" not in log


def test_the_module_launcher_needs_no_start_up_file(corpus: Path) -> None:
    """``python -m sd_plugin onmt_train`` where ``.pth`` files are not read (``-S`` hides site-packages)."""
    name = config(corpus, "m.yaml", save_model="m", train_steps=3, valid_steps=3)
    paths = os.pathsep.join(path for path in sys.path if path and path != str(Path(__file__).parent))
    code = (
        "import sys; sys.argv[1:1] = ['onmt_train']; import runpy; runpy.run_module('sd_plugin', run_name='__main__')"
    )
    finder = next(iter(Path(torch.__file__).parents[1].glob("__editable___sd_plugin*_finder.py")), None)
    if finder is not None:
        code = f"import {finder.stem}; {finder.stem}.install(); " + code
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("SD_PLUGIN", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, "-config", name], cwd=corpus, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sd-plugin: structured dropout report" in done.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sd_mode": "st"}, "sd_mode must be one of random, nr_st, nr_rh_st, got 'st'"),
        ({"sd_recurrent_dropout": 1.5}, "sd_recurrent_dropout must be in [0, 1), got 1.5"),
        ({"sd_recurent_dropout": 0.3}, "did you mean sd_recurrent_dropout?"),
        ({"rnn_type": "GRU"}, "rnn_type GRU has no structured dropout"),
        ({"src_vocab": "absent.de"}, "no such file: absent.de"),
        (
            {"data": {**SMALL["data"], "valid": {"path_src": "gone.de", "path_tgt": "valid.en"}}},  # type: ignore[dict-item]
            "valid/path_src: no such file: gone.de",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(corpus: Path, changes: dict[str, object], told: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir() if path.is_file()}
    before.pop(corpus / "bad.yaml", None)
    name = config(corpus, "bad.yaml", save_model="bad", **changes)
    done = program("onmt_train", "-config", name, folder=corpus, code=2)
    lines = [line for line in done.stderr.splitlines() if "INFO" not in line and "WARNING" not in line]
    assert len(lines) == 1 and lines[0].startswith("sd-plugin: error: ") and told in lines[0], lines
    (corpus / "bad.yaml").unlink()
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir() if path.is_file()} == before


def test_a_translation_config_with_training_keys_is_told_so(trained: Path) -> None:
    (trained / "t.yaml").write_text("model: sd_step_60.pt\nsrc: few.de\noutput: none\nsd_mode: nr_st\n")
    done = program("onmt_translate", "-config", "t.yaml", folder=trained, code=2)
    assert "sd_mode is not an option of this program" in done.stderr


def test_the_vocabulary_is_built_from_the_same_configuration(corpus: Path) -> None:
    files = {"src_vocab": "v2.de", "tgt_vocab": "v2.en"}
    name = config(corpus, "v.yaml", sd_mode="nr_st", **files)
    program("onmt_build_vocab", "-config", name, "-n_sample", "100", folder=corpus)
    assert (corpus / "v2.de").exists()
    name = config(corpus, "v.yaml", sd_mod="nr_st", **files)
    done = program("onmt_build_vocab", "-config", name, "-n_sample", "100", "-overwrite", folder=corpus, code=2)
    assert "unknown option sd_mod; did you mean sd_mode?" in done.stderr


def test_an_unknown_switch_is_one_warning(corpus: Path) -> None:
    done = program("onmt_build_vocab", "--help", folder=corpus, plugin="st")
    told = [line for line in done.stderr.splitlines() if "sd-plugin" in line]
    assert len(told) == 1 and "nr_rh_st" in told[0]
