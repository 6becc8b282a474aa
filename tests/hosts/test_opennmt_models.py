"""OpenNMT-py models with structured dropout, built in this process: against the stock ones, and by themselves."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections.abc import Iterator

import pytest
import torch

onmt = pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

from sd_plugin import StructuredDropoutLSTM, UsageError, _pays, stats  # noqa: E402
from sd_plugin.attentional import is_available  # noqa: E402
from sd_plugin.kernels import Kept  # noqa: E402
from sd_plugin.patches import opennmt as patch  # noqa: E402

from .. import counted  # noqa: E402
from . import opennmt_models as models  # noqa: E402


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch.enable(replace=False)
    stats.reset()
    yield
    patch.disable()
    stats.reset()


def use_own_kernels(model: torch.nn.Module) -> None:
    """Without a dropout the LSTMs would fall back on ``nn.LSTM`` itself, which would compare it with itself."""
    found = [m for m in model.modules() if isinstance(m, StructuredDropoutLSTM)]
    assert found
    for lstm in found:
        lstm.native = False


DECODERS = [
    *(
        {"input_feed": f, "global_attention": a}
        for f, a in itertools.product((0, 1), ("dot", "general", "mlp", "none"))
    ),
    {"input_feed": 1, "coverage_attn": True},
    {"input_feed": 1, "copy_attn": True, "copy_attn_type": "dot"},
    {"input_feed": 1, "copy_attn": True, "reuse_copy_attn": True, "coverage_attn": True},
    *({"input_feed": 1, "context_gate": gate} for gate in ("source", "target", "both")),
]
ENCODERS = [
    {"encoder_type": "sd_rnn"},
    {"encoder_type": "sd_brnn"},
    {"encoder_type": "sd_brnn", "bridge": True},
    {"encoder_type": "sd_rnn", "bridge": True, "layers": 1},
    {"encoder_type": "sd_brnn", "layers": 3},
]


@pytest.mark.parametrize("changes", [*DECODERS, *ENCODERS], ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_without_dropout_equals_the_stock_model(changes: dict[str, object]) -> None:
    structured = models.build(models.options(**changes))
    use_own_kernels(structured)
    stock_changes = dict(changes)
    if "encoder_type" in changes:
        stock_changes["encoder_type"] = str(changes["encoder_type"]).removeprefix("sd_")
    stock = models.stock_twin(structured, **stock_changes)
    assert [n for n, _ in structured.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert not list(structured.named_buffers())
    assert "sd_plugin" not in type(stock.encoder).__module__ and "sd_plugin" not in type(stock.decoder).__module__
    models.assert_same(models.run(structured), models.run(stock))


@pytest.mark.parametrize("changes", [{"input_feed": 0}, {"input_feed": 1}, {"encoder_type": "sd_brnn"}])
def test_eval_mode_drops_nothing(changes: dict[str, object]) -> None:
    structured = models.build(models.options(dropout=[0.4], **changes)).eval()
    stock_changes = dict(changes)
    stock_changes["encoder_type"] = str(changes.get("encoder_type", "sd_rnn")).removeprefix("sd_")
    stock = models.stock_twin(structured, **stock_changes).eval()
    models.assert_same(models.run(structured), models.run(stock))
    assert not stats.sites()


COPY = {"copy_attn": True, "global_attention": "general"}
TOGETHER = [
    {},
    {"coverage_attn": True},
    *({**COPY, "copy_attn_type": kind} for kind in ("dot", "general", "mlp")),
    {**COPY, "coverage_attn": True, "global_attention": "dot"},
    {**COPY, "coverage_attn": True, "reuse_copy_attn": True},
]


@pytest.mark.skipif(not is_available(torch.zeros(1)), reason="no backend here is faster with the decoder at once")
@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("changes", TOGETHER, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_the_decoder_in_one_piece_is_the_one_of_many_steps(
    changes: dict[str, object], sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks; also what goes on from the state of a former call, as in truncated back-propagation."""
    model = models.build(models.options(dropout=[0.4], sd_sampling=sampling, **changes))
    src, tgt, lengths = models.batch()
    asked = []

    def run(available: bool, pays_from: float = 0) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        monkeypatch.setattr(_pays, "ASKED_FOR", pays_from)
        monkeypatch.setattr(
            "sd_plugin.opennmt.decoder.is_available", lambda emb: asked.append(available) is None and available
        )
        torch.manual_seed(5)
        stats.reset()
        results = models.run(model)
        assert all(site.lost == 0 for site in stats.sites().values())
        # Of the feed, the copy attention and the generator. (In one piece the attention's join skips too.)
        counts = stats.sites()["decoder.output"].dense, stats.sites()["decoder.output"].skipped
        model.decoder.detach_state()
        out, attentions = model(src, tgt, lengths, bptt=True)
        return results | {"again": out, **{f"again.{k}": v for k, v in attentions.items()}}, counts

    (steps, counted), (together, also_counted) = run(False), run(True)
    assert asked == [False, False, True, True]
    models.assert_same(together, steps)
    assert also_counted == counted and all(value.is_contiguous() for value in together.values())
    by_torch, nothing = run(False, pays_from=math.inf)
    models.assert_same(by_torch, steps)
    assert nothing == (0, 0)


@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize(
    "changes",
    [
        {"context_gate": "both"},
        {"global_attention": "mlp"},
        {"global_attention": "none"},
        {"global_attention": "general", "global_attention_function": "sparsemax", "coverage_attn": True},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_steps_that_skip_are_those_that_torch_multiplies(
    changes: dict[str, object], sampling: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with dropout: results and gradients under the same masks, and no hint lost in either."""
    model = models.build(models.options(dropout=[0.4], sd_sampling=sampling, sd_mode=mode, **changes))

    def run(pays_from: float) -> tuple[dict[str, torch.Tensor], int]:
        monkeypatch.setattr(_pays, "ASKED_FOR", pays_from)
        torch.manual_seed(5)
        stats.reset()
        results = models.run(model)
        assert all(site.lost == 0 for site in stats.sites().values())
        return results, sum(site.skipped for name, site in stats.sites().items() if name.startswith("decoder.rnn"))

    (skipping, skipped), (dense, none) = run(0), run(math.inf)
    models.assert_same(skipping, dense)
    assert skipped > 0 == none


@pytest.mark.parametrize("changes", [{"context_gate": "both"}, {"global_attention": "mlp"}, {"attention_func": 1}])
def test_what_stands_between_two_steps_keeps_the_decoder_in_steps(changes: dict[str, object]) -> None:
    if changes.pop("attention_func", None):
        changes["global_attention_function"] = "sparsemax"
    model = models.build(models.options(dropout=[0.4], **changes))
    assert not model.decoder._is_one_operation(torch.zeros(2, 3, 10, dtype=torch.float64))


@pytest.mark.parametrize("name", ["attn", "copy_attn"])
def test_an_attention_that_somebody_watches_is_called_at_every_step(name: str) -> None:
    model = models.build(models.options(dropout=[0.4], copy_attn=True))
    seen: list[torch.Size] = []
    getattr(model.decoder, name).register_forward_hook(lambda module, given, found: seen.append(given[0].shape))
    models.run(model)
    assert seen == [torch.Size([4, models.HIDDEN])] * 4


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
@pytest.mark.parametrize(
    "changes",
    [
        {"input_feed": 0},
        {"input_feed": 0, "global_attention": "mlp"},
        {"input_feed": 1},
        {"input_feed": 1, "copy_attn": True},
        {"input_feed": 1, "global_attention": "mlp"},
        {"input_feed": 0, "global_attention": "dot"},
        {"input_feed": 1, "global_attention": "dot", "share_decoder_embeddings": True, "word_vec_size": models.HIDDEN},
        {"encoder_type": "sd_brnn", "layers": 3},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_skipping_changes_no_result(
    changes: dict[str, object], mode: str, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks with every hint ignored: dense products with zeros in them."""
    model = models.build(models.options(dropout=[0.4], sd_mode=mode, sd_sampling=sampling, **changes))
    torch.manual_seed(5)
    skipping = models.run(model)
    assert sum(site.skipped for site in stats.sites().values()) > 0
    assert all(site.lost == 0 for site in counted.sites().values())
    monkeypatch.setattr("sd_plugin.hints.lookup", lambda tensor: None)
    torch.manual_seed(5)
    models.assert_same(models.run(model), skipping)


def test_every_site_drops_the_same_units_for_the_whole_batch() -> None:
    model = models.build(models.options(dropout=[0.5], input_feed=0))
    src, tgt, lengths = models.batch(rows=5)
    enc_out, state, _ = model.encoder(src, lengths)
    model.decoder.init_state(src, enc_out, state)
    dec_out, _ = model.decoder(tgt[:, :-1], enc_out, src_len=lengths)
    zero = dec_out == 0
    assert torch.equal(zero, zero[:1].expand_as(zero))
    assert (zero.sum(-1) == models.HIDDEN // 2).all()
    assert not torch.equal(zero[0, 0], zero[0, 1]) or not torch.equal(zero[0, 1], zero[0, 2])


def test_input_feed_skips_the_union_of_embedding_and_feed() -> None:
    model = models.build(models.options(dropout=[0.5]))
    models.run(model)
    sites = stats.sites()
    # Four target steps; the embedding (10) feeds [B, 4H] products at all of them, the feed (12) at all but the first.
    rows, columns = 4, 4 * models.HIDDEN
    assert sites["decoder.embeddings"].dense == 3 * 4 * rows * columns * 10
    feed = 3 * 3 * rows * columns * 12
    generator = 3 * 4 * rows * models.VOCAB * 12
    assert sites["decoder.output"].dense == feed + generator
    assert sites["decoder.output"].skipped == (feed + generator) // 2
    assert sites["decoder.output"].used == sites["decoder.output"].drawn


@pytest.mark.parametrize("input_feed", [0, 1])
@pytest.mark.parametrize("encoder_type", ["sd_rnn", "sd_brnn"])
def test_the_dropout_schedule_reaches_every_site(input_feed: int, encoder_type: str) -> None:
    model = models.build(models.options(dropout=[0.0], input_feed=input_feed, encoder_type=encoder_type))
    models.run(model)
    assert not stats.sites()
    model.update_dropout(0.5, 0.0)
    models.run(model)
    sites = stats.sites()
    directions = ("", "_reverse") if encoder_type == "sd_brnn" else ("",)
    between = "between" if input_feed else "l1.input"
    assert set(sites) == {
        "encoder.embeddings",
        "encoder.rnn.l1.input",
        "encoder.rnn.output",
        *(f"encoder.rnn.l{layer}{d}.recurrent" for layer in (0, 1) for d in directions),
        "decoder.embeddings",
        f"decoder.rnn.{between}",
        "decoder.rnn.l0.recurrent",
        "decoder.rnn.l1.recurrent",
        "decoder.rnn.output",
        "decoder.output",
    }
    assert all(site.dropped * 2 == site.units for site in sites.values())
    stats.reset()
    model.update_dropout(0.0, 0.0)
    models.run(model)
    assert not stats.sites()


def test_fixed_probabilities_do_not_follow_the_schedule() -> None:
    model = models.build(models.options(dropout=[0.1], sd_recurrent_dropout=0.25, sd_output_dropout=0.0))
    model.update_dropout(0.5, 0.0)
    models.run(model)
    sites = stats.sites()
    assert sites["decoder.rnn.l0.recurrent"].dropped * 4 == sites["decoder.rnn.l0.recurrent"].units
    assert "encoder.rnn.output" not in sites and "decoder.rnn.output" not in sites


def test_nr_st_has_no_recurrent_dropout_and_random_is_the_stock_model() -> None:
    models.run(models.build(models.options(dropout=[0.5], sd_mode="nr_st")))
    assert stats.sites() and not any("recurrent" in site or "rnn.output" in site for site in stats.sites())
    random = models.build(models.options(dropout=[0.5], sd_mode="random"))
    for part in (random.encoder, random.decoder):
        assert type(part).__module__.startswith("onmt.")


def test_the_options_are_read_back_from_a_checkpoint() -> None:
    from onmt.utils.parse import ArgumentParser

    opt = models.options(dropout=[0.3], sd_mode="nr_st", sd_sampling="bernoulli", encoder_type="sd_brnn")
    again = ArgumentParser.ckpt_model_opts(opt)
    ArgumentParser.update_model_opts(again)
    ArgumentParser.validate_model_opts(again)
    model = models.build(again)
    assert model.encoder.rnn.dropout_mode == "nr_st" and model.encoder.rnn.sampling == "bernoulli"
    assert model.encoder.rnn.bidirectional and model.decoder.bidirectional_encoder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sd_mode": "st"}, "sd_mode must be one of random, nr_st, nr_rh_st, got 'st'"),
        ({"sd_sampling": "some"}, "sd_sampling must be one of exact, bernoulli"),
        ({"sd_recurrent_dropout": 1.0}, r"sd_recurrent_dropout must be in \[0, 1\), got 1.0"),
        ({"sd_output_dropout": -0.1}, "sd_output_dropout must be in"),
        ({"dropout": [0.2, 1.5]}, "dropout must be in"),
        ({"sd_mode": "nr_st", "sd_recurrent_dropout": 0.3}, "sd_recurrent_dropout needs sd_mode nr_rh_st"),
        ({"sd_mode": "random", "sd_output_dropout": 0.3}, "sd_output_dropout needs sd_mode nr_st or nr_rh_st"),
        ({"decoder_type": "sd_brnn"}, "decoder_type has no sd_brnn: use sd_rnn"),
        ({"rnn_type": "GRU"}, "rnn_type GRU has no structured dropout"),
        ({"rnn_type": "SRU", "gpu_ranks": [0]}, "rnn_type SRU has no structured dropout"),
    ],
)
def test_bad_options_are_refused_in_one_line(changes: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        models.options(**changes)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_newer_plugin_is_refused() -> None:
    from onmt.utils.parse import ArgumentParser

    opt = models.options()
    opt.sd_format += 1
    with pytest.raises(UsageError, match="newer sd-plugin"):
        ArgumentParser.ckpt_model_opts(opt)
    opt = models.options()
    opt.sd_shape = "block"
    with pytest.raises(UsageError, match=r"newer sd-plugin \(option sd_shape\)"):
        ArgumentParser.ckpt_model_opts(opt)


@pytest.mark.parametrize("argument", ["--sd-mode=nr_st", "--SD_mode", "-sdmode", "--sd_smapling=exact", "--sd_x"])
@pytest.mark.parametrize("strict", [False, True])
def test_misspelt_keys_are_refused(argument: str, strict: bool) -> None:
    from sd_plugin.opennmt.options import check_unknown

    with pytest.raises(UsageError, match="unknown option"):
        check_unknown([argument], strict)
    check_unknown(["--sdk", "--seed_x", "sd_mode", "-s"], strict)


def test_a_misspelt_key_is_told_in_sentences() -> None:
    from sd_plugin.opennmt.options import check_unknown

    valid = "Valid: sd_mode, sd_recurrent_dropout, sd_output_dropout, sd_sampling"
    for argument, told in (
        ("--sd_typo", f"unknown option sd_typo. {valid}"),
        ("--sd_mod", f"unknown option sd_mod; did you mean sd_mode? {valid}"),
    ):
        with pytest.raises(UsageError) as caught:
            check_unknown([argument], strict=False)
        assert str(caught.value) == told


def test_a_mode_asked_of_a_stock_checkpoint_is_not_ignored_in_silence() -> None:
    from sd_plugin.opennmt.options import check_resumed

    stock = models.options(encoder_type="rnn", decoder_type="rnn")
    patch.enable(replace=True, mode="nr_st")
    for accepted in ({}, {"sd_mode": "nr_st"}, {"sd_sampling": "exact"}):
        assert check_resumed(Namespace(**{**vars(stock), **accepted}), stock) is None
    for refused in ({"sd_mode": "nr_rh_st"}, {"sd_sampling": "bernoulli"}, {"sd_output_dropout": 0.1}):
        with pytest.raises(UsageError, match="the checkpoint's own"):
            check_resumed(Namespace(**{**vars(stock), **refused}), stock)


def test_modes_are_the_same_everywhere() -> None:
    from sd_plugin import _environment, lstm

    assert _environment.MODES == lstm.MODES


def test_the_same_seed_starts_from_the_same_parameters() -> None:
    """Building the structured model draws what building the stock one draws."""
    states = []
    for types in ({}, {"encoder_type": "rnn", "decoder_type": "rnn"}):
        torch.manual_seed(3)
        from onmt.model_builder import build_base_model

        build_base_model(models.options(**types), models.vocabs())
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1])


def test_a_failure_midway_leaves_the_host_unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    from onmt.encoders import str2enc

    patch.disable()
    monkeypatch.setattr(patch, "_patch_trainer", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch.enable(replace=True)
    assert "sd_rnn" not in str2enc
    assert type(models.build(models.options(encoder_type="rnn", decoder_type="rnn")).encoder).__module__[:4] == "onmt"


def test_replacement_takes_the_stock_names_for_lstms_only() -> None:
    types = {"encoder_type": "brnn", "decoder_type": "rnn"}
    assert type(models.build(models.options(**types)).encoder).__module__.startswith("onmt.")
    patch.enable(replace=True, mode="nr_st")
    replaced = models.build(models.options(dropout=[0.3], **types))
    assert replaced.encoder.rnn.dropout_mode == "nr_st" and replaced.encoder.rnn.bidirectional
    assert type(replaced.decoder).__module__.startswith("sd_plugin.")
    gru = models.build(models.options(rnn_type="GRU", **types))
    assert isinstance(gru.encoder.rnn, torch.nn.GRU) and type(gru.decoder).__module__.startswith("onmt.")
    mixed = models.build(models.options(encoder_type="sd_brnn", decoder_type="rnn"))
    assert mixed.decoder.bidirectional_encoder


def test_disable_puts_the_host_back() -> None:
    from onmt.decoders import str2dec
    from onmt.encoders import str2enc
    from onmt.utils.parse import ArgumentParser

    patch.disable()
    before = (
        dict(str2enc),
        dict(str2dec),
        dict(vars(ArgumentParser)),
        onmt.opts.model_opts,
        onmt.trainer.Trainer.train,
    )
    patch.enable(replace=True)
    patch.enable(replace=True)
    assert str2enc["rnn"] is not before[0]["rnn"]
    patch.disable()
    after = (dict(str2enc), dict(str2dec), dict(vars(ArgumentParser)), onmt.opts.model_opts, onmt.trainer.Trainer.train)
    assert after == before


def test_an_unknown_version_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    from onmt.encoders import str2enc

    patch.disable()
    monkeypatch.setattr(onmt, "__version__", "9.0.0")
    with pytest.raises(UsageError, match=r"OpenNMT-py 9\.0\.0 is not supported; supported: 3\.5\.1"):
        patch.enable()
    assert "sd_rnn" not in str2enc


def test_dropped_columns_of_the_feed_are_those_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint of ``[emb_t, feed]`` must name every column that is not zero."""
    seen: list[tuple[torch.Tensor, Kept]] = []
    from sd_plugin import hints

    # Step by step, where there is such a tensor.
    monkeypatch.setenv("SD_PLUGIN_BACKEND", "reference")
    original = hints.cat

    def spy(tensors: list[torch.Tensor]) -> torch.Tensor:
        joined = original(tensors)
        hint = hints.lookup(joined)
        assert hint is not None
        seen.append((joined.detach(), hint.kept))
        return joined

    monkeypatch.setattr("sd_plugin.hints.cat", spy)
    models.run(models.build(models.options(dropout=[0.5])))
    assert len(seen) == 4
    for t, (joined, kept) in enumerate(seen):
        assert torch.equal(joined != 0, (kept.mask() & (joined != 0).any(0)).expand_as(joined))
        assert kept.width == (5 + 12 if t == 0 else 5 + 6)
