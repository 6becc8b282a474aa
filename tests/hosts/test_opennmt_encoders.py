"""What encoders hand on, the structured ones and OpenNMT-py's own: structured decoders take it as the stock ones do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

from sd_plugin import UsageError, stats
from sd_plugin.patches import opennmt as patch

from . import opennmt_models as models
from .opennmt_runs import Runs, corpus

#: More than the tokens of ``models.batch``, which the graph encoder writes as one of so many.
WIDTH = 24


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    patch.disable()
    stats.reset()


def build(structured: bool, **changes: Any) -> Any:
    """The model of these options, of the host's own types; structured on request."""
    patch.disable()
    if structured:
        patch.enable(replace=True)
    # The host's mean encoder computes in single precision.
    model = models.build(models.options(decoder_type="rnn", **changes), torch.float32)
    assert type(model.decoder).__module__.startswith("sd_plugin." if structured else "onmt.")
    return model


def error_of(model: Any) -> Exception | None:
    try:
        models.run(model)
    except Exception as error:
        return error
    return None


@settings(max_examples=16)
@given(
    encoder_type=st.sampled_from(["rnn", "brnn", "mean"]),
    enc_layers=st.integers(1, 3),
    dec_layers=st.integers(1, 3),
    input_feed=st.sampled_from([1, 1, 0]),
    bridge=st.booleans(),
    variant=st.sampled_from([{}, {"coverage_attn": True}, {"global_attention": "mlp"}, {"global_attention": "none"}]),
)
@example(encoder_type="rnn", enc_layers=2, dec_layers=1, input_feed=1, bridge=False, variant={})
@example(encoder_type="brnn", enc_layers=3, dec_layers=2, input_feed=1, bridge=True, variant={"coverage_attn": True})
@example(encoder_type="rnn", enc_layers=1, dec_layers=2, input_feed=1, bridge=False, variant={})
def test_any_numbers_of_layers_do_what_they_do_in_the_stock_model(variant: dict[str, Any], **changes: Any) -> None:
    if not changes["input_feed"]:
        variant = {name: value for name, value in variant.items() if name != "coverage_attn"}
    options = {"layers": 0, "word_vec_size": models.HIDDEN, **changes, **variant}
    stock = build(False, **options).eval()
    failure = error_of(stock)
    structured = build(True, **options).eval()
    if failure is not None:
        assert changes["enc_layers"] < changes["dec_layers"] or not changes["input_feed"], failure
        told = f"dec_layers is {changes['dec_layers']}, and the encoder has {changes['enc_layers']} of them"
        for training in (False, True):
            with pytest.raises(UsageError, match=told):
                models.run(structured.train(training))
        return
    models.assert_same(models.run(structured), models.run(stock))
    expected = models.run(stock.train())
    models.assert_same(models.run(structured.train()), expected)
    stats.reset()
    found = models.run(build(True, dropout=[0.4], **options))
    assert found.keys() == expected.keys() and all(value.isfinite().all() for value in found.values())
    assert all(site.skipped or site.waived for site in stats.sites().values()) and stats.sites()


ENCODERS: dict[str, dict[str, Any]] = {
    "rnn": {},
    "brnn": {"bridge": True},
    "mean": {},
    "cnn": {},
    "transformer": {"heads": 2, "transformer_ff": 8},
    "ggnn": {"state_dim": WIDTH, "n_node": 6, "n_steps": 2, "n_edge_types": 2},
}


def train(structured: bool, vocabulary: Path, **changes: Any) -> str | list[float]:
    """Three steps of the host's own ``Trainer``: the losses, or its error."""
    from onmt.trainer import Trainer
    from onmt.utils.loss import LossCompute
    from onmt.utils.optimizers import Optimizer

    sizes = {"hidden_size": WIDTH, "word_vec_size": WIDTH, "parallel_mode": "data_parallel"}
    loss_options = {"label_smoothing": 0.0, "lambda_coverage": 0.0, "lambda_align": 0.0, "lm_prior_model": None}
    options = {"dropout": [0.3], "src_vocab": str(vocabulary), **sizes, **loss_options, **changes}
    src, tgt, lengths = models.batch()
    batch = {"src": src, "tgt": tgt, "srclen": lengths, "align": None}
    losses: list[float] = []
    try:
        model = build(structured, **options)
        opt = models.options(decoder_type="rnn", **options)
        loss = LossCompute.from_opts(opt, model, models.vocabs()["tgt"])
        optimizer = Optimizer(torch.optim.SGD(model.parameters(), 0.1), 0.1, max_grad_norm=0)
        trainer = Trainer(
            model, loss, loss, SimpleNamespace(transforms=[]), [], optimizer, dropout=[0.3], attention_dropout=[0.1]
        )
        trainer._maybe_report_training = lambda step, steps, rate, report: losses.append(report.loss) or report
        trainer.train(iter([(batch, 0)] * 3), 3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert len(losses) == 3
    return losses


@pytest.mark.parametrize("input_feed", [0, 1])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_of_the_host_trains_or_fails_as_with_its_own_decoder(
    encoder: str, input_feed: int, tmp_path: Path
) -> None:
    vocabulary = tmp_path / "vocabulary"
    vocabulary.write_text("\n".join(["<unk>", "<blank>", ",", "<EOT>", *map(str, range(6))]) + "\n")
    changes = {"encoder_type": encoder, "input_feed": input_feed, **ENCODERS[encoder]}
    if encoder == "ggnn" and not input_feed:
        # It hands on four states.
        changes["layers"] = 4
    stock = train(False, vocabulary, **changes)
    found = train(True, vocabulary, **changes)
    assert (found == stock) if isinstance(stock, str) else isinstance(found, list), (stock, found)
    assert isinstance(stock, str) == (encoder in ("cnn", "transformer")), stock


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": None, "enc_layers": 2, "dec_layers": 1},
        {"layers": None, "enc_layers": 3, "dec_layers": 2, "coverage_attn": True, "encoder_type": "brnn"},
        {"encoder_type": "mean"},
    ],
    ids=lambda changes: changes.get("encoder_type", "rnn"),
)
def test_the_hosts_programs_train_resume_and_translate(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path)
    patch.enable(replace=True)
    runs = Runs(tmp_path, monkeypatch, capsys)
    options = {"encoder_type": "rnn", "decoder_type": "rnn", **changes}
    assert "decoder.rnn.l0.recurrent" in runs.train("m", **options)
    log = runs.train("m", train_from="m_step_2.pt", train_steps=4, dropout=[0.6], **options)
    whose = " of the decoder" if options["encoder_type"] == "mean" else ""
    assert f"sd-plugin: dropout{whose} 0.3 → 0.6, from the configuration" in log
    runs.program("translate", "-model", "m_step_4.pt", "-src", "text", "-output", "translated")
    assert (tmp_path / "translated").read_text().count("\n") == 24


def test_too_few_layers_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path)
    patch.enable(replace=False)
    runs = Runs(tmp_path, monkeypatch, capsys)
    with pytest.raises(SystemExit) as ended:
        runs.train("m", layers=None, enc_layers=1, dec_layers=2)
    assert ended.value.code == 2
    told = "dec_layers is 2, and the encoder has 1 of them: at least as many are needed"
    assert runs.written.splitlines()[-1] == f"sd-plugin: error: {told}"
