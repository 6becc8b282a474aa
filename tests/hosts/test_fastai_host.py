"""fastai itself with the plugin: language models and text classifiers, trained, exported and loaded by its learners.

Skipped where fastai cannot be imported. Every program runs in a process of its own, so that the start-up hook is what
patches it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from ..environ import clean
from ..patience import PATIENCE
from ..tolerances import of_training

pytestmark = pytest.mark.hosts

#: torchvision from PyPI fails to import beside a torch without CUDA, for want of this operation; fastai needs neither.
IMPORTS = """
    import json, random, sys, torch
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    from fastai.text.all import *
"""

#: Sentences in which a number word mostly follows from the one before; the label says by which of two rules.
DATA = """
    defaults.cpus = 0
    set_seed(1)
    generator = random.Random(1)
    words = "one two three four five six seven eight nine ten".split()

    def sentence(rule, length=60):
        numbers = [generator.randrange(10)]
        for _ in range(length):
            likely = (numbers[-1] + (3 if rule else 7)) % 10
            numbers.append(likely if generator.random() < 0.9 else generator.randrange(10))
        return " ".join(words[number] for number in numbers)

    labels = [n % 2 for n in range(60)]
    valid = [n >= 48 for n in range(60)]
    table = pd.DataFrame({"text": [sentence(n) for n in labels], "label": labels, "valid": valid})
    corpus = pd.DataFrame({"text": [sentence(0) for n in labels], "valid": valid})
    small = {"emb_sz": 32, "n_hid": 48, "n_layers": 2}

    def language_model(drop_mult):
        dls = TextDataLoaders.from_df(corpus, text_col="text", is_lm=True, valid_col="valid", bs=4, seq_len=12)
        config = {**awd_lstm_lm_config, **small, "hidden_p": 0.25, "input_p": 0.5, "weight_p": 0.5, "output_p": 0.25}
        learn = language_model_learner(
            dls, AWD_LSTM, config=config, drop_mult=drop_mult, pretrained=False, path=".", metrics=[accuracy]
        )
        learn.remove_cb(ProgressCallback)
        return learn

    def classifier():
        dls = TextDataLoaders.from_df(
            table, text_col="text", label_col="label", valid_col="valid", bs=4, seq_len=12,
            text_vocab=language_model(1.0).dls.vocab,
        )
        config = {**awd_lstm_clas_config, **small, "hidden_p": 0.25, "input_p": 0.5, "weight_p": 0.5}
        learn = text_classifier_learner(
            dls, AWD_LSTM, config=config, drop_mult=1.0, pretrained=False, path=".", metrics=[accuracy], seq_len=12
        )
        learn.remove_cb(ProgressCallback)
        return learn

    def tell(learn, **more):
        # Per epoch: training loss, validation loss, accuracy.
        values = [list(map(float, epoch)) for epoch in learn.recorder.values]
        losses = [float(loss) for loss in learn.recorder.losses]
        print(json.dumps({"epochs": values, "losses": losses, "batches": len(learn.dls.train), **more}))
"""

EPOCHS = 3
#: A validation loss below this was learned: guessing has log 10 = 2.30.
LEARNED = 1.0
LANGUAGE_MODEL = [
    "input_dp", "rnns.0.l0.recurrent", "hidden_dps.0", "rnns.1.l0.recurrent", "output_dp",
]  # fmt: skip
CLASSIFIER = LANGUAGE_MODEL[:-1]


@functools.cache
def missing() -> str | None:
    """Why fastai cannot be imported; None if it can."""
    if importlib.util.find_spec("fastai") is None:
        return "fastai is not installed"
    if not list(Path(torch.__file__).parents[1].glob("sd_plugin*.dist-info")):
        return "sd-plugin is not installed beside fastai"
    done = process("", Path.cwd(), SD_PLUGIN="0")
    return None if done.returncode == 0 else f"fastai cannot be imported: {done.stderr.strip().splitlines()[-1]}"


def process(program: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = clean()
    variables = {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environ}
    source = textwrap.dedent(IMPORTS) + program
    return subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )


def run(program: str, folder: Path, **environ: str) -> tuple[dict[str, Any], str]:
    """What a program tells, and what the plugin says about it."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    done = process(textwrap.dedent(DATA) + textwrap.dedent(program), folder, SD_PLUGIN_REPORT="1", **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def skipped(report: str) -> dict[str, tuple[int, str, str, int]]:
    """Site -> patterns, units dropped, multiply-adds skipped, hints lost."""
    found = re.findall(r"^  (\S+) +(\d+) +([\d.]+%) +([\d.]+%) +0 +(\d+)$", report, re.MULTILINE)
    return {site: (int(patterns), dropped, left_out, int(lost)) for site, patterns, dropped, left_out, lost in found}


TRAIN = """
    learn = language_model({drop_mult})
    learn.fit_one_cycle({epochs}, 3e-2)
    learn.save("lm")
    learn.save_encoder("encoder")
    learn.export("lm.pkl")
    learn.model.eval().reset()
    torch.save(learn.model(torch.arange(12).view(2, 6))[0], "logits.pt")
    tell(learn)
"""

LOAD = """
    learn = load_learner("lm.pkl")
    learn.model.eval().reset()
    exported = learn.model(torch.arange(12).view(2, 6))[0]
    learn = language_model(1.0).load("lm")
    learn.model.eval().reset()
    saved = learn.model(torch.arange(12).view(2, 6))[0]
    expected = torch.load("logits.pt")
    learn.fit_one_cycle(1, 1e-3)
    plugin = [name for name in sys.modules if name.startswith("sd_plugin.kernels")]
    tell(learn, exported=torch.equal(exported, expected), saved=torch.equal(saved, expected), plugin=plugin)
"""

CLASSIFY = """
    learn = classifier()
    learn.load_encoder("encoder")
    learn.unfreeze()
    learn.fit_one_cycle(6, 2e-2)
    learn.export("classifier.pkl")
    tell(learn)
"""

CLASSIFY_LOADED = """
    learn = load_learner("classifier.pkl")
    learn.remove_cb(ProgressCallback)
    right = [int(learn.predict(table.text[n])[0]) == labels[n] for n in range(48, 60)]
    print(json.dumps({"right": sum(right)}))
"""


def test_a_language_model_then_a_classifier(tmp_path: Path) -> None:
    told, report = run(TRAIN.format(drop_mult=1.0, epochs=EPOCHS), tmp_path, SD_PLUGIN="1")
    last = told["epochs"][-1][1]
    assert last < LEARNED
    rows = skipped(report)
    assert list(rows) == LANGUAGE_MODEL
    shares = {"input_dp": 50.0, "hidden_dps.0": 25.0, "output_dp": 25.0}
    for site, (patterns, dropped, left_out, lost) in rows.items():
        assert (patterns, lost) == (EPOCHS * told["batches"], 0), site
        assert dropped == left_out == f"{shares.get(site, 50.0)}%", site
    for file in ("lm.pkl", "models/lm.pth", "models/encoder.pth"):
        assert b"sd_plugin" not in (tmp_path / file).read_bytes()

    loaded, report = run(LOAD, tmp_path, SD_PLUGIN="0")
    assert (loaded["exported"], loaded["saved"], loaded["plugin"], report) == (True, True, [], "")
    assert loaded["epochs"][-1][1] < last + 0.1, "it goes on from there"

    told, report = run(CLASSIFY, tmp_path, SD_PLUGIN="1")
    assert told["epochs"][-1][2] >= 0.9, "it tells one rule from the other"
    rows = skipped(report)
    assert list(rows) == CLASSIFIER
    assert all(lost == 0 for *_, lost in rows.values())
    assert b"sd_plugin" not in (tmp_path / "classifier.pkl").read_bytes()
    assert run(CLASSIFY_LOADED, tmp_path, SD_PLUGIN="0")[0]["right"] >= 11


def test_nothing_dropped_is_the_same_training(tmp_path: Path) -> None:
    # Exact sampling keeps every unit, and fastai drops none.
    program = TRAIN.format(drop_mult=1e-9, epochs=1)
    expected, _ = run(program, tmp_path, SD_PLUGIN="0")
    told, report = run(program, tmp_path, SD_PLUGIN="1")
    assert set(skipped(report)) == set(LANGUAGE_MODEL)
    noise = of_training(torch.float32, len(expected["losses"]))
    assert told["losses"] == pytest.approx(expected["losses"], rel=noise)
    assert told["epochs"][0] == pytest.approx(expected["epochs"][0], rel=noise)


@pytest.mark.slow
def test_structured_dropout_learns_as_fastais_own(tmp_path: Path) -> None:
    losses = {}
    for mode in ("random", "nr_st", "nr_rh_st"):
        told, report = run(TRAIN.format(drop_mult=0.5, epochs=EPOCHS), tmp_path, SD_PLUGIN=mode)
        losses[mode] = told["epochs"][-1][1]
        recurrent = [site for site in skipped(report) if site.endswith("recurrent")]
        assert len(recurrent) == (2 if mode == "nr_rh_st" else 0)
        assert all(lost == 0 for *_, lost in skipped(report).values())
    assert losses["random"] < LEARNED, "fastai itself has learned"
    for mode in ("nr_st", "nr_rh_st"):
        assert losses[mode] == pytest.approx(losses["random"], abs=0.1)


def test_mode_random_is_fastais_own(tmp_path: Path) -> None:
    program = TRAIN.format(drop_mult=1.0, epochs=1)
    expected, _ = run(program, tmp_path, SD_PLUGIN="0")
    told, report = run(program, tmp_path, SD_PLUGIN="random")
    assert (told, report) == (expected, "")
