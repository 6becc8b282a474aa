"""awd-lstm-lm's structured dropout, on a stand-in of the same interface: what it computes, and what it leaves alone.

The programs are run in tests/scripts/test_awd_main.py, the host itself in tests/hosts/test_awd_lstm.py.
"""

from __future__ import annotations

import builtins
import importlib
import io
import itertools
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sd_plugin import disable, enable, stats
from sd_plugin.errors import UsageError
from sd_plugin.patches import awd_lstm
from sd_plugin.patterns import draw as draw_pattern

from .. import counted, truth, weights_only
from ..environ import clean
from ..forks import Forks
from ..patience import PATIENCE
from ..tolerances import assert_close

STANDIN = Path(__file__).parent / "standins" / "awd_lstm"
PROGRAMS = ("main", "finetune", "generate", "pointer")
MODULES = tuple(sorted({path.stem for path in STANDIN.glob("*.py")} - set(PROGRAMS)))
MODES = ("random", "nr_st", "nr_rh_st")
WORDS, EMBEDDED, HIDDEN, LAYERS, STEPS, BATCH = 11, 6, 8, 3, 7, 4
RATES = {"dropout": 0.4, "dropouth": 0.25, "dropouti": 0.5, "dropoute": 0.1}
#: Nothing is dropped at this rate, but all that drops is run.
NEVER = 1e-9


@pytest.fixture(autouse=True)
def no_counts() -> Iterator[None]:
    stats.reset()
    yield
    stats.reset()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The stand-in's modules, first on the path; nothing of it is left afterwards."""
    for name in ("SD_PLUGIN", "SD_PLUGIN_TARGETS", "SD_PLUGIN_CASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(STANDIN))
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        disable("awd_lstm")
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(others)


@pytest.fixture
def program(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Any]]:
    """Makes this process look as if it ran one of the host's programs; the result runs a line in it."""

    def start(name: str) -> Callable[..., Any]:
        main = ModuleType("__main__")
        main.__file__ = str(STANDIN / f"{name}.py")
        monkeypatch.setitem(sys.modules, "__main__", main)

        def run(code: str, **values: Any) -> Any:
            vars(main).update({"torch": torch, **values})
            exec(compile(textwrap.dedent(code), main.__file__, "exec"), vars(main))
            return vars(main).get("result")

        return run

    return start


def build(host: SimpleNamespace, kind: str = "LSTM", wdrop: float = 0.5, **rates: float) -> Any:
    """The host's model, the same one every time."""
    torch.manual_seed(0)
    given = {**RATES, **rates}
    return host.model.RNNModel(kind, WORDS, EMBEDDED, HIDDEN, LAYERS, **given, wdrop=wdrop, tie_weights=True)


def step(host: SimpleNamespace, model: Any, seed: int = 1, batches: int = 2) -> dict[str, Tensor]:
    """Everything that training on two consecutive batches gives, by name; gradients are of the second."""
    model.train()
    criterion = host.splitcross.SplitCrossEntropyLoss(EMBEDDED, [])
    text = torch.randint(WORDS, (batches * STEPS + 1, BATCH), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(seed)
    hidden, found = model.init_hidden(BATCH), {}
    for n in range(batches):
        words, targets = text[n * STEPS :][:STEPS], text[n * STEPS + 1 :][:STEPS].reshape(-1)
        hidden = host.utils.repackage_hidden(hidden)
        model.zero_grad()
        output, hidden, raw_outputs, outputs = model(words, hidden, return_h=True)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        whole = loss + 2 * outputs[-1].pow(2).mean() + (raw_outputs[-1][1:] - raw_outputs[-1][:-1]).pow(2).mean()
        whole.backward()
        flat = [part for state in hidden for part in (state if isinstance(state, tuple) else (state,))]
        for name, tensors in {"h": flat, "raw": raw_outputs, "out": [output, *outputs], "loss": [loss]}.items():
            found.update({f"batch {n} {name} {i}": tensor.detach() for i, tensor in enumerate(tensors)})
    found.update({f"gradient {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert sum(name.startswith("gradient") for name in found) >= 4 * LAYERS + 2
    return found


def evaluated(model: Any) -> list[Tensor]:
    """Output and state in evaluation."""
    model.eval()
    words = torch.arange(STEPS * BATCH).view(STEPS, BATCH) % WORDS
    with torch.no_grad():
        output, hidden = model(words, model.init_hidden(BATCH))
    return [output, *(part for state in hidden for part in state)]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def attributes(*more: object) -> dict[tuple[int, str], object]:
    """Every attribute of what the patch may touch: the host's modules and classes, torch's, the running program's."""
    modules = [sys.modules[name] for name in (*MODULES, "__main__")]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    owners = [torch, Tensor, nn.Module, nn.LSTM, nn.CrossEntropyLoss, *modules, *classes, *more]
    return {(id(owner), name): value for owner in owners for name, value in vars(owner).items()}


def changed(before: dict[tuple[int, str], object], after: dict[tuple[int, str], object]) -> set[str]:
    """Names of attributes that are not the same objects as before."""
    return {
        key[1] for key in {*before, *after} if key not in before or key not in after or before[key] is not after[key]
    }


# What is changed, and put back.


@pytest.mark.parametrize("running", [None, *PROGRAMS])
@pytest.mark.parametrize("mode", MODES)
def test_everything_is_put_back(
    host: SimpleNamespace, program: Callable[[str], Any], mode: str, running: str | None
) -> None:
    if running:
        program(running)
    # Loaded here, so that a module which torch or this library loads late is no difference.
    enable("awd_lstm", mode=mode, folder=STANDIN)
    disable("awd_lstm")
    before = attributes()
    enable("awd_lstm", mode=mode)
    names = changed(before, attributes())
    disable("awd_lstm")
    assert not changed(before, attributes())
    assert awd_lstm.changes() == ()
    expected = {"load", "save", "forward", "_setweights"} | ({"embedded_dropout"} if mode != "random" else set())
    expected |= {"open"} if running else set()
    expected |= {"get_batch", *(() if torch.cuda.is_available() else ("cuda",))} if running == "pointer" else set()
    assert names == expected


def test_enabling_again_replaces(host: SimpleNamespace) -> None:
    before = attributes()
    for mode in (*MODES, *MODES):
        enable("awd_lstm", mode=mode)
        step(host, build(host))
        recurrent = [site for site in stats.sites() if "recurrent" in site]
        assert bool(recurrent) is (mode == "nr_rh_st")
        assert bool(stats.sites()) is (mode != "random")
        stats.reset()
    disable("awd_lstm")
    disable("awd_lstm")
    assert not changed(before, attributes())


def test_changes_name_what_is_patched(host: SimpleNamespace) -> None:
    enable("awd_lstm", mode="random")
    random = awd_lstm.changes()
    assert {"torch.load", "torch.save", "weight_drop.WeightDrop._setweights"} <= set(random)
    enable("awd_lstm", mode="nr_rh_st")
    more = {
        "locked_dropout.LockedDropout.forward",
        "model.embedded_dropout",
        "splitcross.SplitCrossEntropyLoss.forward",
    }
    assert {*random, *more} <= set(awd_lstm.changes())
    assert not more & set(random)


# Mode random.


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("wdrop", [0.5, 0.0])
def test_random_is_the_hosts_own_dropout(host: SimpleNamespace, kind: str, wdrop: float) -> None:
    expected = step(host, build(host, kind, wdrop))
    assert any((value == 0).any() for value in expected.values()), "something is dropped"
    enable("awd_lstm", mode="random")
    assert_same(step(host, build(host, kind, wdrop)), expected)


def test_without_the_patch_training_after_evaluation_fails(host: SimpleNamespace) -> None:
    """What modern torch has against the host; without it the next test would mean nothing."""
    model = build(host)
    step(host, model)
    evaluated(model)
    with pytest.raises(TypeError, match="as parameter 'weight_hh_l0'"):
        step(host, model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_after_evaluation(host: SimpleNamespace, mode: str, kind: str) -> None:
    enable("awd_lstm", mode=mode)
    model = build(host, kind)
    first = step(host, model)
    names = [name for name, _ in model.named_parameters()]
    for _ in range(2):
        evaluation = evaluated(model)
        assert_same(step(host, model), first)
        assert_same(evaluated(model), evaluation)
    assert [name for name, _ in model.named_parameters()] == names


# What structured modes compute.


@pytest.mark.parametrize("case", [None, "I", "II", "III", "IV"])
@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
@pytest.mark.parametrize("rate", [0.0, NEVER])
def test_where_nothing_is_dropped_nothing_differs(
    host: SimpleNamespace, mode: str, case: str | None, rate: float
) -> None:
    def undropped() -> Any:
        model = build(host, **dict.fromkeys(RATES, rate))
        for rnn in model.rnns:
            rnn.dropout = rate
        return model

    expected = step(host, undropped())
    assert all((value != 0).any() for value in expected.values())
    enable("awd_lstm", mode=mode, case=case)
    assert_close(step(host, undropped()), expected)
    assert bool(stats.sites()) is (rate > 0 and case in (None, "III", "IV"))
    assert all(site.dropped == 0 for site in stats.sites().values())


@pytest.mark.parametrize("wdrop", [0.5, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_the_hosts(host: SimpleNamespace, mode: str, wdrop: float) -> None:
    expected = evaluated(build(host, wdrop=wdrop))
    enable("awd_lstm", mode=mode)
    model = build(host, wdrop=wdrop)
    assert_same(evaluated(model), expected)
    step(host, model)
    assert_same(evaluated(model), expected)
    found = stats.sites() if mode == "random" else counted.sites()
    assert not any(site.drawn % 2 for site in found.values()), "nothing is drawn in evaluation"


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("case", ["I", "II", "III", "IV"])
def test_locked_dropout_drops_by_the_case(host: SimpleNamespace, case: str, sampling: str) -> None:
    enable("awd_lstm", mode="nr_st", case=case, sampling=sampling)
    x = torch.full((5, 4, 200), 3.0)
    dropped = host.locked_dropout.LockedDropout()(x, 0.25)
    kept = dropped != 0
    assert (kept == kept[:, :1]).all() == (case in ("III", "IV")), "the same units for the whole batch"
    assert (kept == kept[:1]).all() == (case in ("II", "IV")), "the same units at all steps"
    assert_close(dropped[kept], torch.full_like(dropped[kept], 3.0 / 0.75))
    if case in ("III", "IV") and sampling == "exact":
        assert (kept.sum(2) == 150).all()
    else:
        assert 0.6 < kept.float().mean() < 0.9
    if case == "III":
        assert (len(set(kept[:, 0].sum(1).tolist())) == 1) is (sampling == "exact")


def test_case_iii_is_the_default(host: SimpleNamespace) -> None:
    enable("awd_lstm")
    kept = host.locked_dropout.LockedDropout()(torch.ones(5, 4, 200), 0.25) != 0
    assert (kept == kept[:, :1]).all()
    assert not (kept == kept[:1]).all()


@pytest.mark.parametrize("mode", MODES)
def test_locked_dropout_of_nothing_is_nothing(host: SimpleNamespace, mode: str) -> None:
    enable("awd_lstm", mode=mode)
    dropout, x = host.locked_dropout.LockedDropout(), torch.ones(3, 2, 4)
    assert dropout(x, 0) is x
    assert dropout.eval()(x, 0.5) is x


@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_emitted_and_carried_states_are_not_dropped(host: SimpleNamespace, mode: str) -> None:
    """The host's activation regularisation and its next batch read them."""
    enable("awd_lstm", mode=mode)
    model = build(host)
    model.train()
    words = torch.zeros(STEPS, BATCH, dtype=torch.long)
    output, hidden, raw_outputs, outputs = model(words, model.init_hidden(BATCH), return_h=True)
    for layer, (raw, out) in enumerate(zip(raw_outputs, outputs, strict=True)):
        assert (raw != 0).all()
        assert torch.equal(hidden[layer][0][0], raw[-1])
        kept = out != 0
        rate = RATES["dropout" if layer == LAYERS - 1 else "dropouth"]
        assert (kept.sum(2) == round((1 - rate) * raw.shape[2])).all()
        assert_close(out[kept], (raw * raw.shape[2] / kept[0, 0].sum())[kept])
    assert torch.equal(output, outputs[-1].view(-1, EMBEDDED))


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("case", ["I", "II", "III", "IV"])
def test_recurrent_dropout_is_that_of_the_equations(host: SimpleNamespace, case: str, sampling: str) -> None:
    enable("awd_lstm", mode="nr_rh_st", case=case, sampling=sampling)
    torch.manual_seed(2)
    lstm = nn.LSTM(EMBEDDED, HIDDEN, dtype=torch.float64)
    module = host.weight_drop.WeightDrop(lstm, ["weight_hh_l0"], dropout=0.4)
    x = torch.randn(STEPS, BATCH, EMBEDDED, dtype=torch.float64, requires_grad=True)
    h0, c0 = (torch.randn(1, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.manual_seed(3)
    y, (h, c) = module(x, (h0, c0))

    torch.manual_seed(3)
    pattern = draw_pattern(case, STEPS, BATCH, HIDDEN, 0.4, sampling=sampling, dtype=torch.float64)
    factors = truth.multiplier(pattern, STEPS, BATCH, HIDDEN, torch.float64)
    assert (factors == 0).any()
    weights = (lstm.weight_ih_l0, lstm.weight_hh_l0_raw, lstm.bias_ih_l0, lstm.bias_hh_l0)
    expected = truth.lstm_layer(x, h0[0], c0[0], weights, factors, [STEPS] * BATCH)

    def gradients(*outputs: Tensor) -> tuple[Tensor, ...]:
        loss = sum(
            (one.squeeze(0) * torch.cos(torch.arange(one.numel())).view_as(one.squeeze(0))).sum() for one in outputs
        )
        return torch.autograd.grad(loss, (x, h0, c0, *weights))

    assert_close((y, h[0], c[0]), expected)
    assert_close(gradients(y, h, c), gradients(*expected))


@pytest.mark.parametrize("variational", [False, True])
def test_nr_st_drops_the_weights_that_the_host_drops(host: SimpleNamespace, variational: bool) -> None:
    def undropped_inputs() -> Any:
        model = build(host, **dict.fromkeys(RATES, 0.0))
        for rnn in model.rnns:
            rnn.variational = variational
        return model

    expected = step(host, undropped_inputs())
    enable("awd_lstm", mode="nr_st")
    # Where no unit is dropped the weights' masks are the only draws.
    assert_close(step(host, undropped_inputs()), expected)
    with pytest.raises(AssertionError):
        assert_close(step(host, undropped_inputs(), seed=2), expected)


def test_the_recurrent_weight_itself_is_not_dropped_in_nr_rh_st(host: SimpleNamespace) -> None:
    """Dropped weights would be zeros here and there; dropped units leave them in the gates i, f and g, or in none.

    The gate o has more of them: at a step where a unit's output is dropped, all the same its cell goes on.
    """
    dropped = step(host, build(host))["gradient rnns.0.module.weight_hh_l0_raw"]
    assert (dropped == 0).float().mean() > 0.3
    gates = (dropped == 0).view(4, -1, dropped.shape[1])[:3]
    assert not (gates.all(0) | ~gates.any(0)).all()
    enable("awd_lstm", mode="nr_rh_st")
    zeros = step(host, build(host))["gradient rnns.0.module.weight_hh_l0_raw"] == 0
    gates = zeros.view(4, -1, zeros.shape[1])[:3]
    assert (gates.all(0) | ~gates.any(0)).all()
    assert zeros.float().mean() < 0.3


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.none() | st.integers(0, 8),
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 10**6),
    by_frequency=st.booleans(),
)
def test_embedded_dropout_is_the_hosts(
    host: SimpleNamespace, size: tuple[int, int], shape: tuple[int, int], padding: int | None, rate: float, seed: int,
    by_frequency: bool,
) -> None:  # fmt: skip
    stock = host.embed_regularize.embedded_dropout
    enable("awd_lstm")
    patched = host.embed_regularize.embedded_dropout
    assert patched is host.model.embedded_dropout
    disable("awd_lstm")
    assert patched is not stock
    torch.manual_seed(seed)
    padding = padding if padding is not None and padding < size[0] else None
    embed = nn.Embedding(*size, padding_idx=padding, scale_grad_by_freq=by_frequency)
    words, direction = torch.randint(size[0], shape), torch.randn(*shape, size[1])
    results = []
    for function in (stock, patched):
        torch.manual_seed(seed)
        value = function(embed, words, dropout=rate)
        (gradient,) = torch.autograd.grad((value * direction).sum(), embed.weight)
        results.append((value, gradient, torch.rand(1)))
    (value, gradient, after), (expected, expected_gradient, expected_after) = results
    assert torch.equal(value, expected)
    assert torch.equal(after, expected_after), "as many draws"
    if words.unique().numel() == words.numel():
        assert torch.equal(gradient, expected_gradient)
    # A word that occurs twice has a sum, which is rounded before or after it is scaled.
    assert_close(gradient, expected_gradient)


def test_embedded_dropout_of_rows_that_depend_on_the_table_is_the_hosts(host: SimpleNamespace) -> None:
    stock, embed, words = host.embed_regularize.embedded_dropout, nn.Embedding(5, 3), torch.tensor([[0, 4], [2, 4]])
    renormalised = nn.Embedding(5, 3, max_norm=0.1)
    scale = torch.tensor(2.0)
    torch.manual_seed(1)
    expected = stock(embed, words, 0.5, scale), stock(embed, words, 0, scale)
    enable("awd_lstm")
    torch.manual_seed(1)
    assert_same(
        (host.model.embedded_dropout(embed, words, 0.5, scale), host.model.embedded_dropout(embed, words, 0, scale)),
        expected,
    )
    with torch.no_grad():
        assert host.model.embedded_dropout(renormalised, words, 0.5).norm(dim=-1).max() < 0.11


@settings(max_examples=25)
@given(
    rows=st.integers(1, 12), hidden=st.integers(1, 6), words=st.integers(2, 20), seed=st.integers(0, 10**6),
    flat=st.booleans(),
)  # fmt: skip
def test_the_loss_of_one_split_is_the_hosts(
    host: SimpleNamespace, rows: int, hidden: int, words: int, seed: int, flat: bool
) -> None:
    torch.manual_seed(seed)
    criterion = host.splitcross.SplitCrossEntropyLoss(hidden, [])
    weight, bias = torch.randn(words, hidden, requires_grad=True), torch.randn(words, requires_grad=True)
    x, targets = torch.randn(rows, hidden, requires_grad=True), torch.randint(words, (rows,))
    given_rows = x if flat else x.view(rows, 1, hidden)
    results = []
    for structured in (False, True):
        if structured:
            enable("awd_lstm")
        loss = criterion(weight, bias, given_rows, targets)
        results.append((loss, *torch.autograd.grad(loss, (weight, bias, x))))
    disable("awd_lstm")
    assert_close(results[1], results[0])


@pytest.mark.parametrize(("splits", "verbose"), [([3], False), ([2, 5], False), ([], True), ([4], True)])
def test_other_losses_are_left_to_the_host(
    host: SimpleNamespace, splits: list[int], verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    criterion = host.splitcross.SplitCrossEntropyLoss(4, splits)
    weight, x = torch.randn(9, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True)
    targets = torch.arange(20) % 9

    def run() -> tuple[Tensor, ...]:
        loss = criterion(weight, torch.zeros(9), x, targets, verbose)
        return (loss, *torch.autograd.grad(loss, (weight, x, *criterion.parameters())))

    expected, printed = run(), capsys.readouterr().out
    assert bool(printed) is verbose
    enable("awd_lstm")
    assert_same(run(), expected)
    assert capsys.readouterr().out == printed
    assert all(len(counts) == 2 for counts in criterion.stats.values()), "the host's own counters go on"


def test_a_whole_run_draws_the_same_from_the_same_seed(host: SimpleNamespace) -> None:
    enable("awd_lstm")
    first = step(host, build(host), seed=4)
    assert_same(step(host, build(host), seed=4), first)
    assert not torch.equal(step(host, build(host), seed=5)["batch 0 loss 0"], first["batch 0 loss 0"])


# What is skipped.


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("case", ["III", "IV"])
@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_every_pattern_is_used_and_none_is_lost(host: SimpleNamespace, mode: str, case: str, sampling: str) -> None:
    enable("awd_lstm", mode=mode, case=case, sampling=sampling)
    step(host, build(host))
    expected = {"embedding", "rnns.1.input", "rnns.2.input", "output"}
    if mode == "nr_rh_st":
        expected |= {f"rnns.{layer}.l0.recurrent" for layer in range(LAYERS)}
    sites = stats.sites()
    assert set(sites) == expected
    for site in sites.values():
        assert site.drawn == site.used == 2, "once per batch"
        assert site.lost == site.waived == 0
        assert site.skipped > 0
        if sampling == "exact":
            # Forward, backward and weight gradient of the product leave out the share that is dropped.
            assert site.skipped / site.dense == pytest.approx(site.dropped / site.units)
    products = 3 * 2 * STEPS * BATCH
    assert sites["embedding"].dense == products * EMBEDDED * 4 * HIDDEN
    assert sites["rnns.1.input"].dense == products * HIDDEN * 4 * HIDDEN
    assert sites["output"].dense == products * EMBEDDED * WORDS
    if mode == "nr_rh_st":
        assert sites["rnns.0.l0.recurrent"].dense == products * HIDDEN * 4 * HIDDEN


def test_random_cases_skip_nothing_and_lose_nothing(host: SimpleNamespace) -> None:
    for case in ("I", "II"):
        enable("awd_lstm", case=case)
        step(host, build(host))
    assert stats.sites() == {}


@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_without_weight_drop_the_plain_lstm_skips(host: SimpleNamespace, mode: str) -> None:
    enable("awd_lstm", mode=mode)
    model = build(host, wdrop=0.0)
    assert all(type(rnn) is nn.LSTM for rnn in model.rnns)
    step(host, model)
    sites = stats.sites()
    assert set(sites) == {"embedding", "rnns.1.input", "rnns.2.input", "output"}
    assert all(site.used == 2 and site.skipped and not site.lost for site in sites.values())


def test_an_lstm_of_somebody_else_is_torchs(host: SimpleNamespace) -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(4, 5), torch.randn(3, 2, 4)
    expected = lstm(x)
    enable("awd_lstm")
    assert_same(lstm(x), expected)
    assert stats.sites() == {}


def test_a_gru_drops_weights_as_the_host_does(host: SimpleNamespace) -> None:
    rates = dict.fromkeys(RATES, 0.0)
    expected = step(host, build(host, "GRU", **rates))
    enable("awd_lstm", mode="nr_rh_st")
    assert_close(step(host, build(host, "GRU", **rates)), expected)
    step(host, build(host, "GRU"))
    sites = stats.sites()
    assert set(sites) == {"embedding", "rnns.1.input", "rnns.2.input", "output"}
    assert sites["output"].skipped and not sites["output"].lost, "the product with the vocabulary"
    assert sites["embedding"].lost == 2, "told, because torch's GRU skips nothing"


@pytest.mark.parametrize("mode", MODES)
def test_weight_drop_of_another_layer_is_the_hosts(host: SimpleNamespace, mode: str) -> None:
    """As the host's QRNN has it."""

    def run(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        return [module(torch.ones(2, 5)).detach() for _ in range(2)]

    torch.manual_seed(0)
    linear = host.weight_drop.WeightDrop(nn.Linear(5, 7), ["weight"], dropout=0.5)
    expected = run(linear)
    assert not torch.equal(*expected)
    enable("awd_lstm", mode=mode)
    assert_same(run(linear), expected)
    linear.eval()
    assert torch.equal(*run(linear))
    linear.train()
    assert_same(run(linear), expected)


# Models outlive the patch.


@pytest.mark.parametrize(("before", "after"), list(itertools.product([None, *MODES], MODES)))
def test_a_model_may_be_older_than_the_patch_and_outlive_it(
    host: SimpleNamespace, before: str | None, after: str
) -> None:
    enable("awd_lstm", mode=after)
    expected = step(host, build(host)), evaluated(build(host))
    disable("awd_lstm")
    if before:
        enable("awd_lstm", mode=before)
    model = build(host)
    step(host, model)
    evaluated(model)
    file = io.BytesIO()
    torch.save(model, file)
    enable("awd_lstm", mode=after)
    file.seek(0)
    for one in (model, torch.load(file, weights_only=False)):
        assert_same(step(host, one), expected[0])
        assert_same(evaluated(one), expected[1])
    disable("awd_lstm")
    # Without the patch the host does not train after its own evaluation.
    if before:
        assert_same(step(host, model), step(host, build(host)))


def test_checkpoints_hold_nothing_of_the_plugin(host: SimpleNamespace, tmp_path: Path, fork: Forks) -> None:
    """They are loaded and trained on by an interpreter that does not have it."""
    expected = {}
    for mode in MODES:
        enable("awd_lstm", mode=mode)
        model = build(host)
        step(host, model)
        expected[mode] = evaluated(model)[0]
        step(host, model)
        optimizer = torch.optim.ASGD(model.parameters(), lr=0.0)
        optimizer.step()
        saved = [model, host.splitcross.SplitCrossEntropyLoss(EMBEDDED, []), optimizer]
        torch.save(saved, tmp_path / f"{mode}.pt")
        disable("awd_lstm")
        with zipfile.ZipFile(tmp_path / f"{mode}.pt") as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            assert b"sd_plugin" not in archive.read(name)
            assert b"RNNModel" in archive.read(name)
    code = f"""
        import sys, torch
        class Refused:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "sd_plugin":
                    raise ModuleNotFoundError(name)
        # Nor what the start-up file has imported.
        for name in [name for name in sys.modules if name.partition(".")[0] == "sd_plugin"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Refused())
        sys.path.insert(0, {str(STANDIN)!r})
        results = {{}}
        for mode in {MODES!r}:
            model, criterion, optimizer = torch.load(mode + ".pt", weights_only=False)
            words = torch.arange({STEPS * BATCH}).view({STEPS}, {BATCH}) % {WORDS}
            output, hidden = model(words, model.init_hidden({BATCH}))
            criterion(model.decoder.weight, model.decoder.bias, output, words.view(-1)).backward()
            optimizer.step()
            results[mode] = model.eval()(words, model.init_hidden({BATCH}))[0].detach()
        torch.save(results, "results.pt")
        """
    environ = clean("PYTHON", "COV_")
    done = fork("-c", [textwrap.dedent(code)], cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert_close(torch.load(tmp_path / "results.pt"), expected)


# A modern torch, for the checkout's own calls.


@pytest.mark.skipif(not weights_only.is_default(), reason="this torch loads whole objects unless told otherwise")
@pytest.mark.parametrize("mode", MODES)
def test_only_the_hosts_own_files_load_whole_objects(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, mode: str
) -> None:
    run = program("main")
    torch.save(build(host), tmp_path / "model.pt")
    enable("awd_lstm", mode=mode)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(tmp_path / "model.pt")
    model = run("result = torch.load(path)", path=tmp_path / "model.pt")
    assert type(model) is host.model.RNNModel
    with pytest.raises(UsageError, match=r"model\.pt is damaged, or no file of awd-lstm-lm.*[Ww]eights"):
        run("torch.load(path, weights_only=True)", path=tmp_path / "model.pt")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_beside_main_get_the_model_of_what_main_saves(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    run = program(name)
    torch.save([build(host), host.splitcross.SplitCrossEntropyLoss(6, []), None], tmp_path / "list.pt")
    torch.save({"a": [1, 2, 3]}, tmp_path / "other.pt")
    enable("awd_lstm")
    loaded = run("result = torch.load(path)", path=tmp_path / "list.pt")
    assert type(loaded) is (list if name == "main" else host.model.RNNModel)
    assert run("result = torch.load(path)", path=tmp_path / "other.pt") == {"a": [1, 2, 3]}
    model = loaded[0] if name == "main" else loaded
    states, expected = model.eval()(torch.zeros(2, 3, dtype=torch.long), model.init_hidden(3), True)[::2]
    if name != "main":
        expected = [model.decoder(expected[-1])]
    assert torch.equal(states, expected[-1].view(6, -1)), "logits, which they expect; hidden states for main"


def test_shapes_of_old_are_for_the_programs_that_need_them(
    host: SimpleNamespace, program: Callable[[str], Any]
) -> None:
    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    source, args = torch.arange(10).view(5, 2), SimpleNamespace(bptt=3)
    for name in PROGRAMS:
        program(name)
        enable("awd_lstm")
        loss = nn.CrossEntropyLoss()(logits, targets)
        assert loss.shape == ((1,) if name == "finetune" else ())
        assert_close(loss.view(()), torch.nn.functional.cross_entropy(logits, targets))
        assert nn.CrossEntropyLoss(reduction="none")(logits, targets).shape == (4,)
        _, batch = host.utils.get_batch(source, 0, args)
        assert batch.shape == ((6, 1) if name == "pointer" else (6,))
        assert batch.flatten().tolist() == [2, 3, 4, 5, 6, 7]
        if name == "pointer" and not torch.cuda.is_available():
            assert logits.cuda() is logits


DAMAGED = {
    "empty": b"",
    "text": b"the quick brown fox\n",
    "number": b"12\n",
    "pickle": pickle.dumps({"a": 1}),
    "zeros": bytes(100),
    "archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_in_one_line(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, content: bytes
) -> None:
    run = program("main")
    enable("awd_lstm", mode="random")
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    for code in ("torch.load(str(path))", "with open(path, 'rb') as f: torch.load(f)"):
        with pytest.raises(UsageError) as caught:
            run(code, path=path)
        assert f"{path} is damaged, or no file of awd-lstm-lm: " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"corpus\nof words\n", b"cos\nno_such_name\n.", b"]N\x85R."])
def test_a_file_of_something_else_is_told_in_one_line(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, content: bytes
) -> None:
    run = program("main")
    enable("awd_lstm", mode="random")
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UsageError):
        run("torch.load(path)", path=str(tmp_path / "model.pt"))


@given(cut=st.floats(0.0, 0.999))
@settings(max_examples=25)
def test_a_file_that_was_cut_short_is_told(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, cut: float
) -> None:
    run = program("main")
    enable("awd_lstm", mode="random")
    file = io.BytesIO()
    torch.save(host.data.Dictionary(), file)
    path = tmp_path / "model.pt"
    path.write_bytes(file.getvalue()[: int(cut * len(file.getvalue()))])
    with pytest.raises(UsageError, match="is damaged"):
        run("torch.load(path)", path=str(path))


def test_a_missing_file_is_missing(host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path) -> None:
    run = program("main")
    enable("awd_lstm", mode="random")
    with pytest.raises(FileNotFoundError):
        run("torch.load(path)", path=str(tmp_path / "none.pt"))


SAVES = {
    "by name": "torch.save(value, path)",
    "by file": "with open(path, 'wb') as f: torch.save(value, f)",
    "without with": "f = open(path, 'wb')\ntorch.save(value, f)\nf.close()",
}


class Unpicklable:
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("code", SAVES.values(), ids=SAVES)
def test_a_save_replaces_the_file(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, code: str
) -> None:
    run = program("main")
    enable("awd_lstm", mode="random")
    for value in (1, 2):
        run(code, value={"value": value}, path=str(tmp_path / "model.pt"))
        assert torch.load(tmp_path / "model.pt") == {"value": value}
        assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("code", [SAVES["by name"], SAVES["by file"]], ids=["by name", "by file"])
def test_an_interrupted_save_leaves_the_former_file(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, code: str
) -> None:
    run = program("main")
    path = str(tmp_path / "model.pt")
    torch.save({"value": 1}, path)
    with pytest.raises(KeyboardInterrupt):
        run(code, value=[torch.zeros(9), Unpicklable()], path=path)
    assert "by file" not in code or os.path.getsize(path) == 0
    torch.save({"value": 1}, path)
    enable("awd_lstm", mode="random")
    with pytest.raises(KeyboardInterrupt):
        run(code, value=[torch.zeros(9), Unpicklable()], path=path)
    assert torch.load(path) == {"value": 1}
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(
    ("size", "room"),
    [
        pytest.param(100_000, 20_000, id="in the middle"),
        pytest.param(1, 100, id="at the end"),
    ],
)
@pytest.mark.parametrize("code", [SAVES["by name"], SAVES["by file"]], ids=["by name", "by file"])
def test_a_full_disk_leaves_the_former_file_and_nothing_else(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, code: str, size: int, room: int
) -> None:
    run = program("main")
    path = str(tmp_path / "model.pt")
    torch.save({"value": 1}, path)
    enable("awd_lstm", mode="random")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            run(code, value=torch.zeros(size), path=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path) == {"value": 1}
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("code", [SAVES["by name"], SAVES["by file"]], ids=["by name", "by file"])
def test_a_link_is_followed(host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, code: str) -> None:
    run = program("main")
    enable("awd_lstm", mode="random")
    (tmp_path / "link.pt").symlink_to(tmp_path / "target.pt")
    run(code, value={"value": 1}, path=str(tmp_path / "link.pt"))
    assert (tmp_path / "link.pt").is_symlink()
    assert torch.load(tmp_path / "target.pt") == {"value": 1}


@pytest.mark.parametrize("code", [SAVES["by name"], SAVES["by file"]], ids=["by name", "by file"])
def test_what_is_no_ordinary_file_is_written_to_as_ever(
    host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path, code: str
) -> None:
    """A pipe stands for the devices, ``/dev/null`` above all: a test that replaced one would harm the machine."""
    run = program("main")
    enable("awd_lstm", mode="random")
    os.mkfifo(tmp_path / "pipe.pt")
    # Both ends, so that neither waits for the other.
    pipe = os.open(tmp_path / "pipe.pt", os.O_RDWR | os.O_NONBLOCK)
    try:
        run(code, value={"value": 1}, path=str(tmp_path / "pipe.pt"))
        assert (tmp_path / "pipe.pt").is_fifo()
        assert torch.load(io.BytesIO(os.read(pipe, 1 << 16))) == {"value": 1}
    finally:
        os.close(pipe)


def test_other_files_are_opened_as_ever(host: SimpleNamespace, program: Callable[[str], Any], tmp_path: Path) -> None:
    run = program("generate")
    enable("awd_lstm", mode="random")
    run("with open(path, 'w') as f: f.write('words')", path=str(tmp_path / "out.txt"))
    assert run("with open(path) as f: result = f.read()", path=str(tmp_path / "out.txt")) == "words"
    assert open is builtins.open is io.open


# Mistakes.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "nr"}, r"mode must be one of random, nr_st, nr_rh_st, got 'nr'"),
        ({"case": "V"}, r"case must be one of I, II, III, IV, got 'V'"),
        ({"sampling": "some"}, r"sampling must be one of exact, bernoulli, got 'some'"),
        ({"mode": "random", "case": "III"}, "mode random is the host's own dropout, case II; case III needs nr_st"),
        ({"folder": STANDIN.parent}, "standins is not a checkout of awd-lstm-lm: it has no weight_drop.py"),
        ({"folder": STANDIN / "none"}, "none is not a folder"),
    ],
)
def test_a_wrong_argument_is_an_error_and_nothing_is_patched(
    host: SimpleNamespace, options: dict[str, Any], told: str
) -> None:
    before = attributes()
    with pytest.raises(UsageError, match=told):
        enable("awd_lstm", **options)
    assert not changed(before, attributes())
    assert awd_lstm.changes() == ()


def test_case_ii_may_be_named_for_random(host: SimpleNamespace) -> None:
    enable("awd_lstm", mode="random", case="II")
    assert awd_lstm.changes()


def test_a_checkout_of_other_code_is_refused(host: SimpleNamespace, tmp_path: Path) -> None:
    for path in STANDIN.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "locked_dropout.py").write_text("class LockedDropout:\n    def forward(self, x): pass\n")
    with pytest.raises(UsageError, match=r"locked_dropout\.py is not that of awd-lstm-lm: .* takes \(self x\), not"):
        enable("awd_lstm", folder=tmp_path)
    assert awd_lstm.changes() == ()


def test_a_checkout_must_be_the_one_that_import_finds(host: SimpleNamespace, tmp_path: Path) -> None:
    for path in STANDIN.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    before = attributes()
    with pytest.raises(UsageError, match=r"import data finds .*standins.*, not that of"):
        enable("awd_lstm", folder=tmp_path)
    assert not changed(before, attributes())


def test_no_checkout_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "weight_drop" not in sys.modules
    with pytest.raises(UsageError, match="no module weight_drop was found: run in a checkout"):
        enable("awd_lstm")


@pytest.mark.parametrize("imported", [True, False])
def test_another_module_in_the_place_of_one_of_the_hosts(
    host: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    (tmp_path / "utils.py").write_text("value = 1\n")
    before = attributes()
    del sys.modules["utils"]
    monkeypatch.syspath_prepend(str(tmp_path))
    if imported:
        importlib.import_module("utils")
    with pytest.raises(UsageError, match=f"import utils finds {tmp_path / 'utils.py'}, not that of {STANDIN}"):
        enable("awd_lstm")
    assert awd_lstm.changes() == ()
    monkeypatch.setitem(sys.modules, "utils", host.utils)
    assert not changed(before, attributes())


def test_a_patch_that_fails_halfway_is_undone(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(host.splitcross, "SplitCrossEntropyLoss")
    before = attributes()
    with pytest.raises(AttributeError):
        enable("awd_lstm")
    assert not changed(before, attributes())
    assert awd_lstm.changes() == ()


# Through the start-up hook.


@pytest.mark.parametrize(
    ("environ", "sites"),
    [
        ({}, None),
        ({"SD_PLUGIN": "0"}, None),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "opennmt"}, None),
        ({"SD_PLUGIN": "random"}, 0),
        ({"SD_PLUGIN": "nr_st"}, LAYERS + 1),
        ({"SD_PLUGIN": "1"}, 2 * LAYERS + 1),
        ({"SD_PLUGIN": "1", "SD_PLUGIN_CASE": "II"}, 0),
    ],
)
def test_the_environment_says_what_is_patched(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], sites: int | None
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for name in MODULES:
        awd_lstm.on_import(getattr(host, name))
    assert bool(awd_lstm.changes()) is (sites is not None)
    step(host, build(host))
    assert len(stats.sites()) == (sites or 0)


def test_an_impossible_case_in_the_environment_is_told(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN", "1")
    monkeypatch.setenv("SD_PLUGIN_CASE", "V")
    with pytest.raises(ValueError, match="SD_PLUGIN_CASE='V' is no case"):
        awd_lstm.on_import(host.weight_drop)
    assert awd_lstm.changes() == ()


def python(code: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A Python in ``folder`` with the start-up hook."""
    kept = clean("PYTHON", "COV_")
    command = [sys.executable, "-m", "sd_plugin", "program.py"]
    (folder / "program.py").write_text(textwrap.dedent(code))
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env={**kept, "SD_PLUGIN": "1", **environ}
    )


#: The end of a program: nothing was patched.
SEEN = """
from sd_plugin.patches import awd_lstm
assert awd_lstm.changes() == (), awd_lstm.changes()
assert "torch" not in sys.modules
print("untouched")
"""


@pytest.mark.parametrize("package", [False, True])
def test_data_and_model_of_another_program_are_not_even_mentioned(tmp_path: Path, package: bool) -> None:
    for name in ("data", "model", "utils"):
        path = tmp_path / name / "__init__.py" if package else tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("class RNNModel: pass\n")
    done = python(f"import sys, data, model, utils{SEEN}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "untouched\n", "")


@pytest.mark.parametrize("name", ["weight_drop", "locked_dropout", "embed_regularize", "splitcross"])
def test_something_else_of_the_hosts_own_names_is_one_warning(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("class WeightDrop: pass\n")
    (tmp_path / "data.py").write_text("")
    done = python(f"import sys, data, {name}, data{SEEN}", tmp_path)
    assert (done.returncode, done.stdout) == (0, "untouched\n")
    (line,) = done.stderr.splitlines()
    told = line.removeprefix("sd-plugin: ")
    assert told.startswith(("data not patched: UsageError: ", f"{name} not patched: UsageError: "))
    assert "is not a checkout of awd-lstm-lm" in told


def test_the_hook_patches_the_host_and_again_after_a_reload(tmp_path: Path) -> None:
    code = f"""
        import importlib, sys
        sys.path.insert(0, {str(STANDIN)!r})
        import model
        from sd_plugin.patches import awd_lstm
        from sd_plugin import stats
        first = awd_lstm.changes()
        print(len(first) > 9, model.__file__)
        for name in ("weight_drop", "model"):
            importlib.reload(sys.modules[name])
            assert awd_lstm.changes() == first
        import torch
        rnn = model.RNNModel("LSTM", 9, 4, 5, 2, wdrop=0.5)
        for _ in range(2):
            rnn.train()(torch.zeros(3, 2, dtype=torch.long), rnn.init_hidden(2))
            rnn.eval()(torch.zeros(3, 2, dtype=torch.long), rnn.init_hidden(2))
        print(sorted(stats.sites()))
        stats.reset()
        """
    done = python(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    sites = ["embedding", "output", "rnns.0.l0.recurrent", "rnns.1.input", "rnns.1.l0.recurrent"]
    assert done.stdout == f"True {STANDIN / 'model.py'}\n{sites}\n"


def test_after_a_reload_of_one_module_the_others_are_still_patched(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_PLUGIN", "1")
    awd_lstm.on_import(host.weight_drop)
    for module in (host.weight_drop, host.locked_dropout):
        awd_lstm.on_import(importlib.reload(module))
    model = build(host)
    step(host, model)
    assert len(stats.sites()) == 2 * LAYERS + 1
    evaluated(model)
    step(host, model)


def test_a_reload_of_code_that_has_changed_is_the_new_code(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_PLUGIN", "1")
    awd_lstm.on_import(host.weight_drop)
    importlib.reload(host.embed_regularize)
    fresh = host.embed_regularize.embedded_dropout
    awd_lstm.on_import(host.embed_regularize)
    assert host.embed_regularize.embedded_dropout is not fresh
    disable("awd_lstm")
    assert host.embed_regularize.embedded_dropout is fresh
