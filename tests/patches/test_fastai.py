"""fastai's structured dropout, on a stand-in with its module and class interface: its results, and what stays stock.

The host itself is run in tests/hosts/test_fastai_host.py.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sd_plugin
from sd_plugin import UsageError, hints, stats
from sd_plugin.patches import registry

from ..environ import clean
from ..forks import Forks
from ..more import more
from ..tolerances import assert_close

STANDINS = Path(__file__).parent / "standins"
HOST = registry()["fastai"]
WORDS = 30
SITES = [
    "input_dp", "rnns.0.l0.recurrent", "hidden_dps.0", "rnns.1.l0.recurrent", "hidden_dps.1", "rnns.2.l0.recurrent",
    "output_dp",
]  # fmt: skip


@pytest.fixture
def fastai(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's ``fastai.text.models``, unpatched and uncounted. An installed fastai comes back afterwards."""
    imported = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fastai"}
    for name in imported:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(STANDINS))
    stats.reset()
    torch.manual_seed(5)
    yield importlib.import_module("fastai.text.models")
    sd_plugin.disable("fastai")
    stats.reset()
    for name in [name for name in sys.modules if name.split(".")[0] == "fastai"]:
        del sys.modules[name]
    sys.modules.update(imported)


def language_model(fastai: Any, p: float = 0.5, embed_p: float = 0.0, bidir: bool = False) -> nn.Module:
    ps = {"input_p": p, "hidden_p": p, "weight_p": p, "output_p": p, "embed_p": embed_p}
    return fastai.get_language_model(WORDS, 16, 24, 3, bidir=bidir, **ps)


def places(fastai: Any) -> list[tuple[Any, Any]]:
    """What is replaced, and what it is now."""
    classes = [fastai.RNNDropout, fastai.WeightDropout, fastai.EmbeddingDropout, fastai.AWD_LSTM, fastai.LinearDecoder]
    return [(cls, vars(cls)["forward"]) for cls in classes]


def lost() -> dict[str, int]:
    return {name: site.lost for name, site in stats.sites().items() if site.lost}


def gradients(model: nn.Module, text: Tensor) -> list[Tensor]:
    """The logits and every parameter's gradient."""
    model.zero_grad()
    logits, _, _ = model(text)
    logits.logsumexp(-1).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


# ---------------------------------------------------------------------------------------------------------------------
# Switching on and off


def test_disable_puts_everything_back(fastai: Any) -> None:
    before = places(fastai)
    sd_plugin.enable("fastai")
    assert HOST.enabled()
    assert all(now is not was for (_, now), (_, was) in zip(places(fastai), before, strict=True))
    sd_plugin.enable("fastai", mode="nr_st")
    sd_plugin.disable("fastai")
    assert not HOST.enabled()
    assert all(now is was for (_, now), (_, was) in zip(places(fastai), before, strict=True))


def test_mode_random_patches_nothing(fastai: Any) -> None:
    before = places(fastai)
    sd_plugin.enable("fastai")
    sd_plugin.enable("fastai", mode="random")
    assert not HOST.enabled()
    assert places(fastai) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "st"}, "mode must be one of"),
        ({"case": "V"}, "case must be one of"),
        ({"sampling": "some"}, "sampling must be one of"),
        ({"mode": "random", "case": "III"}, "mode random is the host's own dropout, case II"),
    ],
)
def test_invalid_options_patch_nothing(fastai: Any, options: dict[str, Any], told: str) -> None:
    before = places(fastai)
    with pytest.raises(UsageError, match=told):
        sd_plugin.enable("fastai", **options)
    assert places(fastai) == before


def another_fastai(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of the stand-in that differs in one point; the folder to find it in."""
    shutil.copytree(STANDINS / "fastai", folder / "fastai")
    path = folder / "fastai" / file
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    return folder


OTHERS = {
    "older": ("__init__.py", "2.8.12", "2.6.3", "fastai 2.6.3 is not supported; supported: 2.7 and 2.8"),
    "newer": ("__init__.py", "2.8.12", "2.9.0", "fastai 2.9.0 is not supported"),
    "arguments": (
        "text/models/awdlstm.py", "forward(self, x)", "forward(self, x, mask=None)",
        "of fastai 2.8.12 is not the one that can be patched: RNNDropout.forward takes (self x mask), not (self x)",
    ),
    "another parameter": (
        "text/models/awdlstm.py", "weight_p", "drop_p", "WeightDropout.__init__ takes (self module drop_p layer_names)",
    ),
    "no decoder": ("text/models/core.py", "forward(self, input)", "decode(self, input)", "no LinearDecoder.forward"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_another_fastai_is_refused_as_a_whole(
    fastai: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str
) -> None:
    *change, told = OTHERS[other]
    monkeypatch.syspath_prepend(str(another_fastai(tmp_path, *change)))
    for name in [name for name in sys.modules if name.split(".")[0] == "fastai"]:
        del sys.modules[name]
    awd_lstm = importlib.import_module("fastai.text.models.awdlstm")
    assert awd_lstm.__file__.startswith(str(tmp_path))
    before = {name: vars(cls).get("forward") for name, cls in vars(awd_lstm).items() if isinstance(cls, type)}
    with pytest.raises(UsageError, match=re.escape(told)):
        sd_plugin.enable("fastai")
    assert {name: vars(getattr(awd_lstm, name)).get("forward") for name in before} == before
    assert not HOST.enabled()


@pytest.mark.parametrize(("version", "told"), [("2.8.12", None), ("3.0.0", "fastai 3.0.0 is not supported")])
def test_fastai_is_found_without_being_imported(
    fastai: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, told: str | None
) -> None:
    (tmp_path / f"fastai-{version}.dist-info").mkdir()
    (tmp_path / f"fastai-{version}.dist-info" / "METADATA").write_text(f"Name: fastai\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    del sys.modules["fastai"]
    (finding,) = HOST.find({})
    assert (finding.version, finding.where) == (version, str(tmp_path))
    assert finding.problem is None if told is None else told in str(finding.problem)
    assert "fastai" not in sys.modules


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
@pytest.mark.parametrize("bidir", [False, True])
def test_a_dropout_that_drops_nothing_changes_nothing(fastai: Any, mode: str, bidir: bool) -> None:
    # So unlikely a dropout keeps round(0.99 · H) = H units: all of this library runs, and nothing is zero.
    model, text = language_model(fastai, 0.01, bidir=bidir).double(), torch.randint(WORDS, (4, 6))
    for rnn in model[0].rnns:
        rnn.weight_p = 0.01 if mode == "nr_rh_st" else 1e-15
    model.reset()
    expected = gradients(model.eval(), text)
    sd_plugin.enable("fastai", mode=mode)
    model.reset()
    for a, b in zip(gradients(model.train(), text), expected, strict=True):
        assert_close(a, b)
    assert len(stats.sites()) == {"nr_st": 4, "nr_rh_st": 10 if bidir else 7}[mode]
    assert not lost()


def test_every_dropout_of_the_model_is_skipped(fastai: Any) -> None:
    sd_plugin.enable("fastai")
    model = language_model(fastai)
    for size in (4, 4, 3):
        gradients(model, torch.randint(WORDS, (size, 6)))
    assert list(stats.sites()) == SITES
    for site in stats.sites().values():
        assert (site.drawn, site.used, site.lost) == (3, 3, 0)
        assert site.dropped / site.units == site.skipped / site.dense == 0.5


@pytest.mark.parametrize(("p", "kept"), [(0.5, 8), (0.3, 11), (0.75, 4)])
def test_units_are_dropped_for_the_whole_batch(fastai: Any, p: float, kept: int) -> None:
    sd_plugin.enable("fastai")
    y = fastai.RNNDropout(p)(torch.ones(5, 7, 16))
    assert torch.equal(y, y[:1].expand_as(y))
    assert (y[0] != 0).sum(1).tolist() == [kept] * 7
    assert len({tuple(row) for row in y[0].tolist()}) > 1, "others at each time step"
    assert y.max().item() == pytest.approx(16 / kept)


@pytest.mark.parametrize(("case", "same_in_batch", "same_over_time"), [("I", False, False), ("IV", True, True)])
def test_cases(fastai: Any, case: str, same_in_batch: bool, same_over_time: bool) -> None:
    sd_plugin.enable("fastai", case=case)
    zero = fastai.RNNDropout(0.5)(torch.ones(5, 7, 64)) == 0
    assert bool((zero == zero[:1]).all()) is same_in_batch
    assert bool((zero == zero[:, :1]).all()) is same_over_time
    gradients(language_model(fastai), torch.randint(WORDS, (4, 6)))
    assert (SITES[1] in stats.sites()) is same_in_batch, "only structured patterns are counted"


def test_case_II_is_fastais_own_dropout(fastai: Any) -> None:
    model, text = language_model(fastai), torch.randint(WORDS, (4, 6))
    torch.manual_seed(1)
    expected = gradients(model, text)
    sd_plugin.enable("fastai", mode="nr_st", case="II")
    model.reset()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, text), expected, strict=True))


def test_bernoulli_sampling_keeps_more_or_less(fastai: Any) -> None:
    sd_plugin.enable("fastai", sampling="bernoulli")
    y = fastai.RNNDropout(0.5)(torch.ones(2, 20, 64))
    assert len(set((y[0] != 0).sum(1).tolist())) > 1
    gradients(language_model(fastai), torch.randint(WORDS, (4, 6)))
    assert set(SITES) < set(stats.sites())


def test_callbacks_get_states_undropped_and_dropped(fastai: Any) -> None:
    """`RNNRegularizer` penalises the dropped output, and how the undropped one changes from step to step."""
    sd_plugin.enable("fastai")
    model, text = language_model(fastai), torch.randint(WORDS, (4, 6))
    states = []
    model[0].register_forward_hook(lambda module, x, y: states.append(y))
    logits, raw, out = model(text)
    assert raw is states[0]
    assert not (raw == 0).any()
    kept = out != 0
    assert torch.equal(kept, kept[:1].expand_as(kept)) and kept.float().mean() == 0.5
    assert_close(out[kept], (raw * 2)[kept])
    penalty = 2.0 * out.float().pow(2).mean() + (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean()
    found = torch.autograd.grad(logits.logsumexp(-1).mean() + penalty, model[0].rnns[2].weight_hh_l0_raw)[0]
    assert found.abs().sum() > 0
    # The same sum, with the products of the last dropout taken as torch has them.
    dense = nn.functional.linear(raw * (kept * 2), model[1].decoder.weight, model[1].decoder.bias)
    assert_close(logits, dense)
    assert not lost()


def test_no_weights_are_dropped_where_units_are(fastai: Any) -> None:
    sd_plugin.enable("fastai")
    wrapper = fastai.WeightDropout(nn.LSTM(16, 16, batch_first=True), 0.5)
    wrapper.module.weight_hh_l0 = torch.full((64, 16), float("nan"))
    y, _ = wrapper(torch.randn(4, 6, 16))
    y.sum().backward()
    assert torch.isfinite(y).all(), "the raw weight is what is used"
    assert (wrapper.weight_hh_l0_raw.grad != 0).all(), "the gradient reaches each raw weight"
    assert stats.sites()["lstm.l0.recurrent"].dropped == 6 * 8


def test_nr_st_drops_the_weights_that_fastai_drops(fastai: Any) -> None:
    sd_plugin.enable("fastai", mode="nr_st")
    wrapper = fastai.WeightDropout(nn.LSTM(16, 16, batch_first=True), 0.5).double()
    x = fastai.RNNDropout(0.5)(torch.randn(4, 6, 16, dtype=torch.float64))
    torch.manual_seed(1)
    found, _ = wrapper(x)
    assert list(stats.sites()) == ["rnn_dropout"] and not lost()
    found_by_weight = torch.autograd.grad(found.square().sum(), wrapper.weight_hh_l0_raw)[0]
    sd_plugin.disable("fastai")
    torch.manual_seed(1)
    expected, _ = wrapper(x)
    assert_close(found, expected)
    by_weight = torch.autograd.grad(expected.square().sum(), wrapper.weight_hh_l0_raw)[0]
    assert_close(found_by_weight, by_weight)
    assert (by_weight == 0).float().mean() == pytest.approx(0.5, abs=0.1)


@given(
    words=st.integers(2, 12),
    p=st.floats(0.05, 0.9),
    padding=st.one_of(st.none(), st.integers(0, 1)),
    by_frequency=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_words_are_dropped(
    fastai: Any, words: int, p: float, padding: int | None, by_frequency: bool, seed: int
) -> None:
    embedding = nn.Embedding(words, 5, padding_idx=padding, scale_grad_by_freq=by_frequency)
    dropout, text = fastai.EmbeddingDropout(embedding, p), torch.randint(words, (3, 4))
    outcomes = []
    for switch in (sd_plugin.disable, sd_plugin.enable):
        switch("fastai")
        torch.manual_seed(seed)
        y = dropout(text)
        outcomes.append((y, torch.autograd.grad(y.square().sum(), embedding.weight)[0]))
    (expected, by_expected), (found, by_found) = outcomes
    assert torch.equal(found, expected)
    assert_close(by_found, by_expected)


# ---------------------------------------------------------------------------------------------------------------------
# What stays fastai's own


class Marked(Tensor):
    pass


def test_evaluation_is_fastais_own(fastai: Any) -> None:
    model, text = language_model(fastai, embed_p=0.5).eval(), torch.randint(WORDS, (4, 6))
    expected = model(text)
    sd_plugin.enable("fastai")
    model.reset()
    assert all(torch.equal(a, b) for a, b in zip(model(text), expected, strict=True))
    assert not stats.sites()


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda f: f.RNNDropout(0.5), torch.ones(4, 6)),
        (lambda f: f.RNNDropout(0.5), torch.ones(4, 6, 2, 16)),
        (lambda f: f.RNNDropout(0.5), torch.ones(4, 6, 16).as_subclass(Marked)),
        (lambda f: f.RNNDropout(0.0), torch.ones(4, 6, 16)),
        (lambda f: f.WeightDropout(nn.GRU(16, 16, batch_first=True), 0.5), torch.ones(4, 6, 16)),
        (lambda f: f.WeightDropout(nn.LSTM(16, 16), 0.5), torch.ones(4, 6, 16).as_subclass(Marked)),
        (lambda f: f.WeightDropout(nn.LSTM(16, 16), 0.0), torch.ones(4, 6, 16)),
        (lambda f: f.WeightDropout(nn.LSTM(16, 16), 1.0), torch.ones(4, 6, 16)),
        (lambda f: f.WeightDropout(nn.LSTM(16, 16), 0.5, "weight_ih_l0"), torch.ones(4, 6, 16)),
        (lambda f: f.WeightDropout(nn.LSTM(16, 16, 2), 0.5, "weight_hh_l0"), torch.ones(4, 6, 16)),
        (lambda f: f.WeightDropout(nn.LSTM(16, 16), 0.5, ["weight_hh_l0", "weight_ih_l0"]), torch.ones(4, 6, 16)),
        (lambda f: f.EmbeddingDropout(nn.Embedding(9, 5, max_norm=0.5), 0.5), torch.arange(6)),
        (lambda f: f.EmbeddingDropout(nn.Embedding(9, 5), 0.5), torch.arange(6).as_subclass(Marked)),
        (lambda f: f.LinearDecoder(9, 16, 0.0), torch.ones(4, 6, 16)),
    ],
    ids=[
        "2-D", "4-D", "tensor subclass", "p=0", "GRU", "LSTM of a tensor subclass", "LSTM, p=0", "LSTM, p=1",
        "input weights", "one layer of two", "both weights", "max_norm", "words of a tensor subclass", "decoder, p=0",
    ],
)  # fmt: skip
def test_other_modules_are_fastais_own(fastai: Any, make: Any, x: Tensor) -> None:
    module, outcomes = make(fastai), []
    for switch in (sd_plugin.disable, sd_plugin.enable):
        switch("fastai")
        torch.manual_seed(2)
        y = module(x)
        outcomes.append(y[0] if isinstance(y, tuple) else y)
    assert torch.equal(*outcomes)
    assert type(outcomes[0]) is type(outcomes[1])
    assert not stats.sites()


def test_a_scaled_embedding_is_fastais_own(fastai: Any) -> None:
    dropout, text = fastai.EmbeddingDropout(nn.Embedding(9, 5), 0.5), torch.arange(9)
    sd_plugin.enable("fastai")
    torch.manual_seed(2)
    unscaled = dropout(text)
    torch.manual_seed(2)
    assert_close(dropout(text, 0.5), unscaled * 0.5)


def test_a_decoder_of_another_kind_gets_the_dropped_output(fastai: Any) -> None:
    sd_plugin.enable("fastai")
    decoder = fastai.LinearDecoder(9, 16, 0.5)
    decoder.decoder = nn.Sequential(decoder.decoder, nn.Tanh())
    logits, raw, out = decoder(torch.randn(4, 6, 16))
    assert hints.lookup(out) is not None and hints.lookup(raw) is None
    assert_close(logits, decoder.decoder(out))


# ---------------------------------------------------------------------------------------------------------------------
# What else is done with models


@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_hooks_are_called_once(fastai: Any, mode: str) -> None:
    sd_plugin.enable("fastai", mode=mode)
    model, calls = language_model(fastai), []
    hooked = {"lstm": model[0].rnns[1].module, "dropout": model[0].hidden_dps[0], "decoder": model[1].decoder}
    for name, module in hooked.items():
        module.register_forward_hook(lambda module, x, y, name=name: calls.append(name))
    model(torch.randint(WORDS, (4, 6)))
    assert calls == ["dropout", "lstm", "decoder"]


def test_nothing_is_stored_in_the_model(fastai: Any, tmp_path: Path, fork: Forks) -> None:
    sd_plugin.enable("fastai")
    model, text = language_model(fastai, embed_p=0.1), torch.randint(WORDS, (4, 6))
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    output = model(text)
    output[0].sum().backward()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    model.reset()
    torch.save([model, output[1:]], tmp_path / "learner.pkl")
    assert b"sd_plugin" not in (tmp_path / "learner.pkl").read_bytes()
    program = """
        import sys, torch
        model, _ = torch.load("learner.pkl", weights_only=False)
        torch.save(model.eval()(torch.ones(2, 3, dtype=torch.long))[0], "y.pt")
        assert not [name for name in sys.modules if name.startswith("sd_plugin.kernels")]
    """
    run(program, tmp_path, fork, SD_PLUGIN="0")
    sd_plugin.disable("fastai")
    expected = model.eval()(torch.ones(2, 3, dtype=torch.long))[0]
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Whole programs, by the environment

PROGRAM = """
    import torch
    from {first} import *
    from fastai.text.models import get_language_model

    torch.manual_seed(1)
    model = get_language_model(30, 16, 24, 3, input_p=0.5, hidden_p=0.5, weight_p=0.5, output_p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        text = torch.randint(30, (4, 6))
        logits, raw, out = model(text[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) + out.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(loss.item())
"""


def run(
    program: str, folder: Path, fork: Forks | None = None, host: Path = STANDINS, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a program with a host, and with the plugin's variables given and no others.

    In a Python of its own the start-up file reads them; in a fork the launcher does.
    """
    kept = clean()
    variables = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(host), **environ}
    lines = textwrap.dedent(program)
    if fork is None:
        (folder / "program.py").write_text(lines)
        command = [sys.executable, "program.py"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    else:
        (folder / "program.py").write_text(f"import sys; sys.path.insert(1, {str(host)!r})\n{lines}")
        done = fork("-m", ["sd_plugin", "program.py"], cwd=folder, env=variables)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "first", ["fastai.text.models", *more("fastai.text.models.awdlstm", "fastai.text.models.core")]
)
def test_the_environment_patches_an_unmodified_program(first: str, tmp_path: Path) -> None:
    done = run(PROGRAM.format(first=first), tmp_path, SD_PLUGIN="1", SD_PLUGIN_REPORT="1")
    found = re.findall(r"^  (\S+) +3 +50\.0% +50\.0% +0 +0$", done.stderr, re.MULTILINE)
    assert found == SITES
    assert "not patched" not in done.stderr


@pytest.mark.parametrize(
    "environ", [{}, *more({"SD_PLUGIN": "random"}, {"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "opennmt"})]
)
def test_what_is_not_asked_for_is_not_done(environ: dict[str, str], tmp_path: Path, fork: Forks) -> None:
    program = PROGRAM.format(first="fastai.text.models")
    expected = run(program, tmp_path, fork, SD_PLUGIN="0").stdout
    done = run(program, tmp_path, fork, SD_PLUGIN_REPORT="1", **environ)
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.exhaustive
def test_another_fastai_is_one_warning_and_runs_as_it_is(tmp_path: Path, fork: Forks) -> None:
    *change, told = OTHERS["arguments"]
    folder = another_fastai(tmp_path, *change)
    program = PROGRAM.format(first="fastai.text.models")
    expected = run(program, tmp_path, fork, folder, SD_PLUGIN="0").stdout
    done = run(program, tmp_path, fork, folder, SD_PLUGIN="1", SD_PLUGIN_REPORT="1")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sd-plugin: fastai.text.models.core not patched: UsageError: ") and told in line
    assert done.stdout == expected
