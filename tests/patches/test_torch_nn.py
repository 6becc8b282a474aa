"""Programs on torch.nn, untouched: what the patch makes of their dropouts, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import dropout as stock_dropout
from torch.nn.utils.rnn import PackedSequence

import sd_plugin
from sd_plugin import UsageError, hints, stats
from sd_plugin.patches import registry

from ..environ import clean
from ..forks import Forks
from ..more import more
from ..stock import require_lstm
from ..tolerances import assert_close

HOST = registry()["torch_nn"]
#: Everything that is replaced.
PLACES = [
    (nn.RNNBase, "__init__"),
    (nn.RNNBase, "__setstate__"),
    (nn.RNNCellBase, "__init__"),
    (nn.Dropout, "forward"),
    (nn.LSTM, "forward"),
    (nn.Linear, "forward"),
    (torch, "addmm"),
    (nn.utils.rnn, "pack_padded_sequence"),
    (PackedSequence, "__new__"),
    (torch.jit, "script"),
]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Every test starts unpatched and uncounted, and leaves torch so."""
    stats.reset()
    torch.manual_seed(5)
    yield
    sd_plugin.disable("torch_nn")
    stats.reset()


def present() -> list[Any]:
    return [vars(owner)[name] for owner, name in PLACES]


def lost() -> dict[str, int]:
    return {name: site.lost for name, site in stats.sites().items() if site.lost}


def dropped(site: str) -> float:
    """Share of the units that were dropped at this site."""
    return stats.sites()[site].dropped / stats.sites()[site].units


class LanguageModel(nn.Module):
    """As such models are mostly written: one dropout for all places, an LSTM of several layers, a projection."""

    def __init__(self, width: int, p: float, layers: int = 2, batch_first: bool = False, words: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.drop = nn.Dropout(p)
        self.lstm = nn.LSTM(width, width, layers, batch_first=batch_first, dropout=p if layers > 1 else 0.0)
        self.projection = nn.Linear(width, words)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y, _ = self.lstm(self.drop(self.embedding(text)), state)
        return self.projection(self.drop(y)).flatten(0, 1)


def gradients(model: nn.Module, text: Tensor) -> list[Tensor]:
    """The logits and every parameter's gradient."""
    model.zero_grad()
    logits = model(text)
    logits.logsumexp(-1).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


# ---------------------------------------------------------------------------------------------------------------------
# Switching on and off


def test_disable_puts_everything_back() -> None:
    before = present()
    sd_plugin.enable("torch_nn")
    assert HOST.enabled()
    assert all(now is not was for now, was in zip(present(), before, strict=True))
    sd_plugin.enable("torch_nn", mode="nr_st")
    sd_plugin.disable("torch_nn")
    assert not HOST.enabled()
    assert all(now is was for now, was in zip(present(), before, strict=True))


def test_mode_random_patches_nothing() -> None:
    before = present()
    sd_plugin.enable("torch_nn")
    sd_plugin.enable("torch_nn", mode="random")
    assert not HOST.enabled()
    assert all(now is was for now, was in zip(present(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "st"}, "mode must be one of"),
        ({"case": "V"}, "case must be one of"),
        ({"sampling": "some"}, "sampling must be one of"),
        ({"recurrent_dropout": 1.0}, "recurrent_dropout must be a number in"),
        ({"recurrent_dropout": "0.5"}, "recurrent_dropout must be a number in"),
        ({"mode": "nr_st", "recurrent_dropout": 0.5}, "mode nr_st has no recurrent dropout"),
        ({"mode": "random", "recurrent_dropout": 0.5}, "mode random has no recurrent dropout"),
        ({"mode": "random", "case": "III"}, "mode random is torch's own dropout, case I"),
    ],
)
def test_invalid_options_patch_nothing(options: dict[str, Any], told: str) -> None:
    before = present()
    with pytest.raises(UsageError, match=told):
        sd_plugin.enable("torch_nn", **options)
    assert present() == before


def another_forward(self: nn.Dropout, input: Tensor, mask: Tensor) -> Tensor:
    return input * mask


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda patch: patch.setattr(torch, "__version__", "2.1.2"),
            "torch 2.1.2 is not supported; supported: torch 2.2",
        ),
        (lambda patch: patch.setattr(torch, "__version__", "nightly"), "torch nightly is not supported"),
        (
            lambda patch: patch.setattr(nn.Dropout, "forward", another_forward),
            "takes .self input mask., not .self input.",
        ),
        (lambda patch: patch.delattr(nn.utils.rnn, "pack_padded_sequence"), "has no torch.nn.utils.rnn.pack_padded"),
    ],
    ids=["old", "unknown", "signature", "missing"],
)
def test_another_torch_is_refused_as_a_whole(monkeypatch: pytest.MonkeyPatch, change: Any, told: str) -> None:
    change(monkeypatch)
    before = [vars(owner).get(name) for owner, name in PLACES]
    with pytest.raises(UsageError, match=told):
        sd_plugin.enable("torch_nn")
    assert [vars(owner).get(name) for owner, name in PLACES] == before
    assert not HOST.enabled()


def test_torch_is_found_where_it_is_installed() -> None:
    (finding,) = HOST.find({})
    assert finding.version == metadata.version("torch")
    assert finding.problem is None
    assert (Path(finding.where) / "torch").is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.fixture(params=["nr_st", "nr_rh_st"])
def patched(request: pytest.FixtureRequest) -> str:
    """The mode that torch is patched for, once for all examples."""
    sd_plugin.enable("torch_nn", mode=request.param)
    return request.param


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_dropout_everything_is_torchs_own(batch_first: bool) -> None:
    model, text = LanguageModel(16, 0.0, batch_first=batch_first), torch.randint(11, (4, 3))
    expected = gradients(model, text)
    sd_plugin.enable("torch_nn")
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, text), expected, strict=True))
    assert not stats.sites()


@given(
    width=st.integers(1, 9),
    layers=st.integers(1, 3),
    batch_first=st.booleans(),
    steps=st.integers(1, 5),
    batch=st.integers(1, 4),
)
def test_a_dropout_that_drops_nothing_changes_nothing(
    patched: str, width: int, layers: int, batch_first: bool, steps: int, batch: int
) -> None:
    stats.reset()
    text = torch.randint(11, (batch, steps) if batch_first else (steps, batch))
    model = LanguageModel(width, 0.0, layers, batch_first).double()
    expected = gradients(model, text)
    assert not stats.sites()
    # So unlikely a dropout keeps round(0.99 · H) = H units: all of this library runs, and nothing is zero.
    model.drop.p = 0.01
    if layers > 1:
        model.lstm.dropout = 0.01
    for a, b in zip(gradients(model, text), expected, strict=True):
        assert_close(a, b)
    recurrent = f"lstm {width}x{width}.l{layers - 1}.recurrent"
    assert (recurrent in stats.sites()) is (patched == "nr_rh_st")
    assert stats.sites()[f"dropout {width}"].used == 2 and not lost()


@given(
    p=st.floats(0.05, 0.95),
    steps=st.integers(2, 5),
    batch=st.integers(2, 5),
    width=st.integers(4, 40),
    batch_first=st.booleans(),
    inplace=st.booleans(),
)
def test_units_are_dropped_for_the_whole_batch(
    patched: str, p: float, steps: int, batch: int, width: int, batch_first: bool, inplace: bool
) -> None:
    lstm = nn.LSTM(width, 3, batch_first=batch_first)
    x = torch.ones((batch, steps, width) if batch_first else (steps, batch, width))
    y = nn.Dropout(p, inplace=inplace)(x)
    assert (y is x) is inplace
    by_step = y.transpose(0, 1) if batch_first else y
    assert torch.equal(by_step, by_step[:, :1].expand_as(by_step)), "the same units in each row of a time step"
    kept = max(1, round((1 - p) * width))
    assert (by_step[:, 0] != 0).sum(1).tolist() == [kept] * steps
    assert_close(by_step.max(), torch.tensor(width / kept), 1, depth=1)
    assert hints.lookup(y) is not None
    del lstm


def test_new_units_at_every_step() -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(64, 64)
    y = nn.Dropout(0.5)(torch.ones(8, 2, 64))
    assert len({tuple(row.tolist()) for row in y[:, 0] != 0}) == 8
    del lstm


@pytest.mark.parametrize(
    ("case", "same_in_batch", "same_over_time"), [("II", False, True), ("III", True, False), ("IV", True, True)]
)
def test_cases(case: str, same_in_batch: bool, same_over_time: bool) -> None:
    sd_plugin.enable("torch_nn", case=case)
    model = LanguageModel(64, 0.5)
    zero = model.drop(torch.ones(6, 5, 64)) == 0
    assert bool((zero == zero[:, :1]).all()) is same_in_batch
    assert bool((zero == zero[:1]).all()) is same_over_time
    gradients(model, torch.randint(11, (6, 5)))
    sites = {"dropout 64", "lstm 64x64.l0.recurrent", "lstm 64x64.l1.input", "lstm 64x64.l1.recurrent"}
    assert set(stats.sites()) == (sites if same_in_batch else set()), "only structured patterns are counted"


def test_case_I_is_torchs_own_dropout() -> None:
    model, text = LanguageModel(16, 0.5), torch.randint(11, (4, 3))
    torch.manual_seed(1)
    expected = model(text)
    sd_plugin.enable("torch_nn", mode="nr_st", case="I")
    torch.manual_seed(1)
    assert torch.equal(model(text), expected)


def test_bernoulli_sampling_keeps_more_or_less() -> None:
    sd_plugin.enable("torch_nn", sampling="bernoulli")
    model = LanguageModel(64, 0.5, layers=1)
    kept = (model.drop(torch.ones(20, 2, 64))[:, 0] != 0).sum(1)
    assert len(set(kept.tolist())) > 1
    gradients(model, torch.randint(11, (4, 3)))
    assert dropped("lstm 64x64.l0.recurrent") == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lstm_and_projection_compute_what_torch_does_with_the_dropped_tensor(dtype: torch.dtype) -> None:
    require_lstm(dtype)
    lstm, linear = nn.LSTM(24, 24).to(dtype), nn.Linear(24, 7).to(dtype)
    x = torch.randn(5, 3, 24, dtype=dtype)
    sd_plugin.enable("torch_nn", mode="nr_st")
    first = nn.Dropout(0.5)(x)
    y, (h, c) = lstm(first)
    second = nn.Dropout(0.25)(y)
    z = linear(second)
    z.float().square().sum().backward()
    found = [y, h, c, z, *(p.grad for p in (*lstm.parameters(), *linear.parameters()))]
    assert not lost()
    sd_plugin.disable("torch_nn")
    for p in (*lstm.parameters(), *linear.parameters()):
        p.grad = None
    multiplier = second.detach() / y.detach()
    y, (h, c) = lstm(first.detach())
    z = linear(y * multiplier)
    z.float().square().sum().backward()
    expected = [y, h, c, z, *(p.grad for p in (*lstm.parameters(), *linear.parameters()))]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_every_pattern_reaches_its_product(dtype: torch.dtype) -> None:
    sd_plugin.enable("torch_nn")
    model = LanguageModel(16, 0.5)
    with torch.autocast("cpu", dtype):
        logits = model(torch.randint(11, (4, 3)))
    assert logits.dtype == dtype
    logits.float().logsumexp(-1).sum().backward()
    assert len(stats.sites()) == 4 and not lost()


def test_an_inplace_dropout_drops_the_programs_own_tensor() -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(16, 16)
    source = torch.randn(4, 3, 16, requires_grad=True)
    x = source * 2
    nn.Dropout(0.5, inplace=True)(x)
    lstm(x)[0].sum().backward()
    assert not lost()
    assert torch.equal(source.grad == 0, x == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities of the recurrent dropout


@pytest.mark.parametrize(
    ("options", "layers", "before", "between", "expected"),
    [
        ({}, 2, 0.25, 0.5, [0.5, 0.5]),
        ({}, 1, 0.25, 0.0, [0.25]),
        ({}, 2, 0.25, 0.0, [0.25, 0.25]),
        ({}, 2, 0.0, 0.5, [0.5, 0.5]),
        ({"recurrent_dropout": 0.75}, 2, 0.25, 0.5, [0.75, 0.75]),
        ({"recurrent_dropout": 0.75}, 1, 0.0, 0.0, [0.75]),
        ({"recurrent_dropout": 0.0}, 2, 0.25, 0.5, []),
        ({"sampling": "bernoulli"}, 1, 0.25, 0.0, [0.25]),
        ({"mode": "nr_st"}, 2, 0.25, 0.5, []),
        ({}, 1, 0.0, 0.0, []),
    ],
)
def test_recurrent_dropout_is_as_the_dropout_around_it(
    options: dict[str, Any], layers: int, before: float, between: float, expected: list[float]
) -> None:
    sd_plugin.enable("torch_nn", **options)
    lstm = nn.LSTM(64, 64, layers, dropout=between)
    lstm(nn.Dropout(before)(torch.randn(6, 2, 64)))
    names = [name for name in stats.sites() if name.endswith("recurrent")]
    assert names == [f"lstm 64x64.l{layer}.recurrent" for layer in range(len(expected))]
    assert [dropped(name) for name in names] == pytest.approx(expected, abs=1e-9)


def test_dropout_of_one_layer_is_without_effect_as_in_torch() -> None:
    sd_plugin.enable("torch_nn")
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        lstm = nn.LSTM(8, 8, dropout=0.5)
    lstm(torch.randn(3, 2, 8))
    assert not stats.sites()


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def test_without_an_lstm_dropout_is_torchs_own() -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(48, 48)
    del lstm
    assert hints.lookup(nn.Dropout(0.5)(torch.randn(4, 3, 48))) is None


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("how", ["built before", "copied", "unpickled"])
def test_lstms_are_known_however_they_came_about(batch_first: bool, how: str) -> None:
    model = LanguageModel(40, 0.5, batch_first=batch_first)
    if how == "built before":
        sd_plugin.enable("torch_nn")
    elif how == "copied":
        model = _after_the_patch(lambda: copy.deepcopy(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = _after_the_patch(lambda: torch.load(file, weights_only=False))
    gradients(model, torch.randint(11, (5, 3)))
    assert len(stats.sites()) == 4 and not lost()


def _after_the_patch(make: Any) -> Any:
    """The outcome of ``make``, called with the patch, and with the LSTMs that were there before unknown."""
    from sd_plugin.patches.torch_nn._living import lstms

    sd_plugin.enable("torch_nn")
    lstms.forget()
    return make()


def test_each_width_has_the_layout_of_its_own_lstms() -> None:
    sd_plugin.enable("torch_nn")
    one, other = nn.LSTM(20, 24), nn.LSTM(28, 16, batch_first=True, bidirectional=True)
    drop = nn.Dropout(0.5)
    for width, lstm in ((20, one), (28, other)):
        lstm(drop(torch.randn(4, 3, width)))
    for width in (24, 32):
        nn.Linear(width, 2)(drop(torch.randn(4, 3, width)))
    assert {name for name in stats.sites() if name.startswith("dropout")} == {f"dropout {n}" for n in (20, 28, 24, 32)}
    assert not lost()


def test_ambiguous_layouts_leave_dropout_to_torch_with_one_warning() -> None:
    sd_plugin.enable("torch_nn")
    lstms = nn.LSTM(24, 24), nn.LSTM(24, 24, batch_first=True)
    drop = nn.Dropout(0.5)
    with pytest.warns(UserWarning, match="dropout of 24 units stays torch's own: .*batch_first") as told:
        assert hints.lookup(drop(torch.randn(4, 3, 24))) is None
    assert told[0].filename == __file__, "it points at the program"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop(torch.randn(4, 3, 24))
        sd_plugin.enable("torch_nn", batch_first=True)
        lstms[1](drop(torch.randn(4, 3, 24)))
    assert stats.sites()["dropout 24"].drawn == 1 and not lost()


def test_an_lstm_that_awaits_collection_makes_nothing_ambiguous() -> None:
    sd_plugin.enable("torch_nn")
    model, former = LanguageModel(24, 0.5), LanguageModel(24, 0.5, batch_first=True)
    former.__dict__["itself"] = former
    del former
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, torch.randint(11, (4, 3)))
    assert len(stats.sites()) == 4 and not lost()


def test_a_wrong_layout_is_slow_but_right() -> None:
    sd_plugin.enable("torch_nn", mode="nr_st", batch_first=True)
    lstm = nn.LSTM(24, 24)
    x = nn.Dropout(0.5)(torch.randn(4, 4, 24))
    found, _ = lstm(x)
    sd_plugin.disable("torch_nn")
    assert_close(found, lstm(x)[0])
    assert lost() == {"dropout 24": 1}


# ---------------------------------------------------------------------------------------------------------------------
# What stays torch's own


class Louder(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.0


class Marked(Tensor):
    pass


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Dropout(0.5), torch.ones(4, 16)),
        (nn.Dropout(0.5), torch.ones(2, 4, 3, 16)),
        (nn.Dropout(0.5), torch.ones(4, 3, 17)),
        (nn.Dropout(0.5), torch.ones(4, 3, 16).as_subclass(Marked)),
        (nn.Dropout(0.0), torch.ones(4, 3, 16)),
        (nn.Dropout(1.0), torch.ones(4, 3, 16)),
        (nn.Dropout(0.5).eval(), torch.ones(4, 3, 16)),
        (Louder(0.5), torch.ones(4, 3, 16)),
    ],
    ids=["2-D", "4-D", "other width", "tensor subclass", "p=0", "p=1", "eval", "subclass"],
)
def test_other_dropouts_are_torchs_own(module: nn.Dropout, x: Tensor) -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(16, 16)
    torch.manual_seed(2)
    found = module(x)
    torch.manual_seed(2)
    assert torch.equal(found, stock_dropout(x, module.p, module.training))
    assert type(found) is type(x)
    assert not stats.sites()
    del lstm


class OwnCheck(nn.LSTM):
    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(16, 16, 2, dropout=0.5, proj_size=4),
        lambda: nn.LSTM(16, 16, 2, dropout=1.0),
        lambda: OwnCheck(16, 16, 2, dropout=0.5),
        lambda: nn.LSTM(16, 16, 2, dropout=0.5).eval(),
        lambda: nn.GRU(16, 16, 2, dropout=0.5),
    ],
    ids=["projections", "p=1", "subclass", "eval", "GRU"],
)
def test_other_rnns_are_torchs_own(make: Any) -> None:
    rnn, x = make(), torch.randn(4, 3, 16)
    torch.manual_seed(2)
    expected, _ = rnn(x)
    sd_plugin.enable("torch_nn")
    torch.manual_seed(2)
    found, _ = rnn(nn.Dropout(0.0)(x))
    assert torch.equal(found, expected)
    assert not stats.sites()


def test_an_lstm_of_a_tensor_subclass_is_torchs_own() -> None:
    sd_plugin.enable("torch_nn")
    y, _ = nn.LSTM(16, 16, 2, dropout=0.5)(torch.ones(4, 3, 16).as_subclass(Marked))
    assert type(y) is Marked
    assert not stats.sites()


def test_dropout_before_other_rnns_alone_is_torchs_own() -> None:
    sd_plugin.enable("torch_nn")
    rnns = nn.GRU(16, 16), OwnCheck(16, 16), nn.LSTM(16, 16, proj_size=4)
    assert hints.lookup(nn.Dropout(0.5)(torch.randn(4, 3, 16))) is None
    del rnns


# ---------------------------------------------------------------------------------------------------------------------
# Products


def hinted() -> Tensor:
    """``[12, 16]`` with a hint, as a program gets it."""
    lstm = nn.LSTM(16, 16)
    x = nn.Dropout(0.5)(torch.randn(4, 3, 16)).view(-1, 16)
    assert hints.lookup(x) is not None
    del lstm
    return x


@pytest.mark.parametrize("bias", [True, False])
def test_linear_skips(bias: bool) -> None:
    sd_plugin.enable("torch_nn")
    x, linear = hinted(), nn.Linear(16, 5, bias=bias)
    found = linear(x)
    sd_plugin.disable("torch_nn")
    assert_close(found, linear(x))
    assert stats.sites()["dropout 16"].skipped > 0 and not lost()


def test_a_projection_by_addmm_skips() -> None:
    sd_plugin.enable("torch_nn")
    x, weight, bias = hinted(), torch.randn(5, 16, requires_grad=True), torch.randn(5, requires_grad=True)
    found = torch.addmm(bias, x, weight.t())
    (by_weight, by_bias) = torch.autograd.grad(found.square().sum(), (weight, bias))
    assert stats.sites()["dropout 16"].skipped > 0 and not lost()
    sd_plugin.disable("torch_nn")
    expected = torch.addmm(bias, x, weight.t())
    assert_close(found, expected)
    for a, b in zip((by_weight, by_bias), torch.autograd.grad(expected.square().sum(), (weight, bias)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x, w: torch.addmm(b, x, w, beta=2),
        lambda b, x, w: torch.addmm(b, x, w, alpha=0.5),
        lambda b, x, w: torch.addmm(b[:1], x, w),
        lambda b, x, w: torch.addmm(b.expand(12, 5), x, w),
        lambda b, x, w: torch.addmm(input=b, mat1=x, mat2=w),
        lambda b, x, w: torch.addmm(b, x, w, out=torch.empty(12, 5)),
        lambda b, x, w: torch.addmm(b, w.t(), x.t()[:, :5]),
    ],
    ids=["beta", "alpha", "bias of one", "2-D bias", "keywords", "out", "hint on the other side"],
)
def test_other_calls_of_addmm_are_torchs_own(call: Any) -> None:
    sd_plugin.enable("torch_nn")
    x, weight, bias = hinted(), torch.randn(16, 5), torch.randn(5)
    found = call(bias, x, weight)
    sd_plugin.disable("torch_nn")
    assert torch.equal(found, call(bias, x, weight))


def test_a_functional_product_is_dense_and_counted_as_lost() -> None:
    sd_plugin.enable("torch_nn")
    nn.functional.linear(hinted(), torch.randn(5, 16))
    assert lost() == {"dropout 16": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[5, 4, 2], [2, 5, 4]], ids=["sorted", "unsorted"])
def test_a_hint_survives_packing(batch_first: bool, lengths: list[int]) -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(16, 8, batch_first=batch_first, bidirectional=True)
    x = nn.Dropout(0.25)(torch.randn((3, 5, 16) if batch_first else (5, 3, 16)))
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first, lengths[0] == 5)
    found, _ = lstm(packed)
    assert isinstance(found, PackedSequence)
    assert set(stats.sites()) == {"dropout 16", "lstm 16x8.l0.recurrent", "lstm 16x8.l0_reverse.recurrent"}
    assert dropped("lstm 16x8.l0.recurrent") == 0.25
    assert not lost()
    sd_plugin.enable("torch_nn", mode="nr_st")
    skipping, _ = lstm(packed)
    sd_plugin.disable("torch_nn")
    assert_close(skipping.data, lstm(packed)[0].data)


def test_packing_without_a_hint_is_torchs_own() -> None:
    x = torch.randn(5, 3, 16)
    expected = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]))
    sd_plugin.enable("torch_nn")
    found = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]))
    assert torch.equal(found.data, expected.data)
    assert hints.lookup(found.data) is None


# ---------------------------------------------------------------------------------------------------------------------
# What else is done with modules


def test_hooks_are_called_once() -> None:
    sd_plugin.enable("torch_nn")
    model, calls = LanguageModel(16, 0.5), []
    for name, module in model.named_children():
        module.register_forward_hook(lambda module, x, y, name=name: calls.append((name, module)))
    model(torch.randint(11, (4, 3)))
    assert calls == [(name, getattr(model, name)) for name in ("embedding", "drop", "lstm", "drop", "projection")]


def test_a_model_pickled_whole_loads_without_the_plugin(tmp_path: Path, fork: Forks) -> None:
    sd_plugin.enable("torch_nn")
    model = nn.ModuleDict({"drop": nn.Dropout(0.5), "lstm": nn.LSTM(16, 16, 2, dropout=0.5), "out": nn.Linear(16, 4)})
    state = set(model["lstm"].__dict__)
    y, _ = model["lstm"](model["drop"](torch.randn(4, 3, 16)))
    model["out"](model["drop"](y)).sum().backward()
    assert set(model["lstm"].__dict__) == state, "nothing is stored in modules"
    torch.save([model, model["drop"](y)], tmp_path / "model.pt")
    assert b"sd_plugin" not in (tmp_path / "model.pt").read_bytes()
    program = """
        import sys, torch
        model, y = torch.load("model.pt", weights_only=False)
        torch.save(model.eval()["lstm"](torch.ones(2, 2, 16))[0], "y.pt")
        assert not [name for name in sys.modules if name.startswith("sd_plugin.kernels")]
    """
    run(program, tmp_path, fork, SD_PLUGIN="0")
    sd_plugin.disable("torch_nn")
    assert torch.equal(torch.load(tmp_path / "y.pt"), model.eval()["lstm"](torch.ones(2, 2, 16))[0])


def test_scripted_traced_and_compiled_models_are_torchs_own() -> None:
    sd_plugin.enable("torch_nn")
    model, text = LanguageModel(16, 0.5), torch.randint(11, (4, 3))
    block = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 4))
    x, lstm = torch.randn(4, 3, 16), model.lstm
    before = present()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
        traced = torch.jit.trace(block, x, check_trace=False)
    assert present() == before, "script puts the patch back"
    assert scripted(text).shape == (12, 11)
    assert traced(x).shape == torch.compile(block, backend="aot_eager", fullgraph=True)(x).shape
    torch.compile(lambda x: torch.addmm(torch.ones(4), x, torch.ones(16, 4)), backend="aot_eager", fullgraph=True)(x[0])
    assert not stats.sites()
    assert torch.equal(scripted.eval()(text), model.eval()(text))
    del lstm


def test_scripting_finds_the_names_around_a_class() -> None:
    sd_plugin.enable("torch_nn")

    class Inner:
        def __init__(self, a: int) -> None:
            self.a = a

    torch.jit.script(Inner)

    class Outer:
        def __init__(self, a: int) -> None:
            self.inner = Inner(a)

    assert torch.jit.script(Outer)(2).inner.a == 2


def test_gradients_are_checkpointed_as_in_torch() -> None:
    from torch.utils.checkpoint import checkpoint

    sd_plugin.enable("torch_nn")
    model, text = LanguageModel(16, 0.5).double(), torch.randint(11, (4, 3))
    torch.manual_seed(4)
    expected = gradients(model, text)
    torch.manual_seed(4)
    model.zero_grad()
    checkpoint(model, text, use_reentrant=False).logsumexp(-1).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected[1:], strict=True):
        assert_close(parameter.grad, gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Whole programs, by the environment

PROGRAM = """
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.drop = nn.Embedding(7, 20), nn.Dropout(0.4)
            self.lstm, self.out = nn.LSTM(20, 20, 2, dropout=0.4, batch_first=True), nn.Linear(20, 7)

        def forward(self, text):
            return self.out(self.drop(self.lstm(self.drop(self.embedding(text)))[0]))

    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        text = torch.randint(7, (4, 6))
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.6f}")
"""


def run(program: str, folder: Path, fork: Forks | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in this environment, with the variables given and no others of the plugin.

    In a Python of its own the start-up file reads them; in a fork the launcher does, which finds torch imported.
    """
    kept = clean()
    (folder / "program.py").write_text(textwrap.dedent(program))
    variables = {**kept, "OMP_NUM_THREADS": "1", **environ}
    if fork is None:
        command = [sys.executable, "program.py"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    else:
        done = fork("-m", ["sd_plugin", "program.py"], cwd=folder, env=variables)
    assert done.returncode == 0, done.stderr
    return done


def rows(report: str) -> dict[str, tuple[str, ...]]:
    """Site -> patterns, units dropped, multiply-adds skipped, hints lost."""
    found = re.findall(r"^  (\S.*?)  +(\d+) +([\d.]+%) +([\d.]+%) +0 +(\d+)$", report, re.MULTILINE)
    return {name: tuple(rest) for name, *rest in found}


def test_the_environment_patches_an_unmodified_program(fork: Forks, tmp_path: Path) -> None:
    asked = {"SD_PLUGIN_TARGETS": "torch", "SD_PLUGIN_REPORT": "1"}
    done = run(PROGRAM, tmp_path, SD_PLUGIN="1", **asked)
    assert rows(done.stderr) == {
        "dropout 20": ("6", "40.0%", "40.0%", "0"),
        "lstm 20x20.l0.recurrent": ("3", "40.0%", "40.0%", "0"),
        "lstm 20x20.l1.input": ("3", "40.0%", "40.0%", "0"),
        "lstm 20x20.l1.recurrent": ("3", "40.0%", "40.0%", "0"),
    }
    options = {"SD_PLUGIN": "nr_rh_st", "SD_PLUGIN_RECURRENT_DROPOUT": "0.75", "SD_PLUGIN_CASE": "IV"}
    with_options = run(PROGRAM, tmp_path, fork, **options, **asked)
    assert rows(with_options.stderr)["lstm 20x20.l1.recurrent"] == ("3", "75.0%", "75.0%", "0")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, fork: Forks) -> str:
    """What the program prints without the plugin."""
    return run(PROGRAM, tmp_path_factory.mktemp("stock"), fork, SD_PLUGIN="0").stdout


@pytest.mark.parametrize(
    "environ",
    [
        {"SD_PLUGIN": "1"},
        *more({"SD_PLUGIN": "random", "SD_PLUGIN_TARGETS": "torch"}, {"SD_PLUGIN_TARGETS": "torch"}),
    ],
    ids=["not asked for", "random", "no mode"],
)
def test_what_is_not_asked_for_is_not_done(environ: dict[str, str], printed: str, tmp_path: Path, fork: Forks) -> None:
    done = run(PROGRAM, tmp_path, fork, SD_PLUGIN_REPORT="1", **environ)
    assert (done.stdout, done.stderr) == (printed, "")


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"SD_PLUGIN": "1", "SD_PLUGIN_CASE": "V"}, "SD_PLUGIN_CASE='V' is no case"),
        *more(
            (
                {"SD_PLUGIN": "1", "SD_PLUGIN_RECURRENT_DROPOUT": "2"},
                "SD_PLUGIN_RECURRENT_DROPOUT='2' must be a number",
            ),
            ({"SD_PLUGIN": "nr_st", "SD_PLUGIN_RECURRENT_DROPOUT": "0.5"}, "mode nr_st has no recurrent dropout"),
        ),
    ],
)
def test_a_mistake_in_the_environment_is_one_line_and_torch_as_it_is(
    environ: dict[str, str], told: str, printed: str, tmp_path: Path, fork: Forks
) -> None:
    done = run(PROGRAM, tmp_path, fork, SD_PLUGIN_REPORT="1", SD_PLUGIN_TARGETS="torch", **environ)
    (line,) = done.stderr.splitlines()
    assert line.startswith("sd-plugin: torch not patched: ") and told in line
    assert done.stdout == printed


@pytest.mark.parametrize(
    "module", ["sd_plugin.kernels", *more("sd_plugin.functional", "sd_plugin.lstm", "sd_plugin.patterns")]
)
def test_torch_is_patched_when_this_library_is_what_imports_it(module: str, tmp_path: Path) -> None:
    program = f"import {module}, sd_plugin.patches\nassert sd_plugin.patches.registry()['torch_nn'].enabled()"
    done = run(program, tmp_path, SD_PLUGIN="1", SD_PLUGIN_TARGETS="torch")
    assert done.stderr == ""
