"""The configurations: what is compared differs only in the dropout, and the scripts make every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from corpora import CORPORA, NAMES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The others are configurations of scripts in this repository.
ALL = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("zaremba"))
PAIRS = [
    ("iwslt_deen", "iwslt_deen_nr_st", "nr_st"),
    ("iwslt_deen", "iwslt_deen_sd", "nr_rh_st"),
    ("iwslt_envi", "iwslt_envi_nr_st", "nr_st"),
    ("iwslt_envi", "iwslt_envi_sd", "nr_rh_st"),
    ("multi30k", "multi30k_nr_st", "nr_st"),
    ("multi30k", "multi30k_sd", "nr_rh_st"),
    ("demo", "demo_sd", "nr_rh_st"),
]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("stock", "ours", "mode"), PAIRS)
def test_compared_configurations_differ_only_in_the_dropout(stock: str, ours: str, mode: str) -> None:
    stock_options, our_options = load(stock), load(ours)
    different = {
        key: our_options.get(key)
        for key in stock_options.keys() | our_options.keys()
        if stock_options.get(key) != our_options.get(key)
    }
    for output in ("save_model", "log_file"):
        if output in different:
            assert different.pop(output).startswith(f"run/{ours}/")
    assert different == {"encoder_type": "sd_rnn", "decoder_type": "sd_rnn", "sd_mode": mode}
    assert stock_options["encoder_type"] == stock_options["decoder_type"] == "rnn"


@pytest.mark.parametrize("name", ALL)
def test_paths_are_prepared_ones_below_the_repository(name: str) -> None:
    options = load(name)
    corpus = Path(options["data"]["train"]["path_src"]).parts[1]
    assert corpus in NAMES
    for part in ("train", "valid"):
        for side, language in (("src", "de"), ("tgt", "en")):
            if corpus in CORPORA:
                language = CORPORA[corpus].languages[side == "tgt"]
            assert options["data"][part][f"path_{side}"] == f"data/{corpus}/{part}.{language}"
    for key in ("save_data", "save_model", "src_vocab", "tgt_vocab", "log_file"):
        assert options.get(key, "run/").startswith(("run/", f"data/{corpus}/vocab."))
    assert options["gpu_ranks"] == []


@pytest.mark.parametrize("name", ALL)
def test_comment_gives_the_commands(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines[:4] if line.startswith("# ")]
    assert 2 <= len(comment) <= 4
    assert f"# onmt_train -config configs/{name}.yaml" in comment
    assert any(line.startswith("# python scripts/get_data.py ") for line in comment)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("iwslt")])
def test_paper_settings(name: str) -> None:
    options = load(name)
    expected = {
        "rnn_type": "LSTM",
        "layers": 2,
        "hidden_size": 512,
        "global_attention": "general",
        "dropout": [0.3],
        "batch_size": 64,
        "train_steps": 65_000,
        "valid_steps": 5_000,
    }
    assert {key: options[key] for key in expected} == expected
