"""The workloads: every column computes the same where nothing is dropped, and skips what its table says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd_plugin import stats
from sd_plugin.bench import awd_lstm, ner, opennmt_host
from sd_plugin.bench.columns import DENSE, NR_RH_ST, NR_ST, SKIPPING, STOCK
from sd_plugin.bench.registry import WORKLOADS
from sd_plugin.bench.workload import Product, Setup, Training, Workload

from ..tolerances import assert_close

TINY = Setup(tiny=True)
#: The translators once with OpenNMT-py, where it is installed, and once with the stand-in.
CASES = [*WORKLOADS, "opennmt-envi without OpenNMT-py"]


@pytest.fixture(params=CASES)
def workload(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Workload:
    name, _, without = request.param.partition(" ")
    if without:
        monkeypatch.setattr(opennmt_host, "version", lambda: None)
    return WORKLOADS[name]


def copy_parameters(source: Training, target: Training) -> None:
    """Give one training the parameters of another, which must have the same ones."""
    ours, theirs = dict(target.model.named_parameters()), dict(source.model.named_parameters())
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])


def test_without_dropout_all_columns_have_the_same_loss_and_gradients(workload: Workload) -> None:
    setup = replace(TINY, dropout=False)
    stock = workload.build(STOCK, setup)
    expected = stock.gradients()
    for column in workload.columns[1:]:
        training = workload.build(column, setup)
        copy_parameters(stock, training)
        assert_close(training.gradients(), expected)
        for name, parameter in training.model.named_parameters():
            gradient = dict(stock.model.named_parameters())[name].grad
            assert_close(parameter.grad, gradient, name=name)


def test_training_steps_move_the_parameters_and_keep_the_loss_finite(workload: Workload) -> None:
    for column in workload.columns:
        training = workload.build(column, TINY)
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        losses = [training.step() for _ in range(3)]
        assert torch.stack(losses).isfinite().all()
        moved = [not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True)]
        assert all(moved), column


def test_every_column_drops(workload: Workload) -> None:
    for column in workload.columns:
        with_dropout, without = (workload.build(column, replace(TINY, dropout=on)) for on in (True, False))
        copy_parameters(with_dropout, without)
        assert with_dropout.gradients() != without.gradients(), column


def test_the_dense_columns_skip_nothing(workload: Workload) -> None:
    for column in (STOCK, DENSE):
        workload.build(column, TINY).step()
    assert stats.sites() == {}


def skipped(products: list[Product], column: str) -> int:
    """Multiply-adds of FP, BP and WG that the products leave out."""
    return sum(3 * sum(p.rows) * p.outputs * (p.units - p.kept(column)) * p.count for p in products)


@pytest.mark.parametrize("column", SKIPPING)
def test_what_is_skipped_is_what_the_products_say(workload: Workload, column: str) -> None:
    if column not in workload.columns:
        pytest.skip("the paper has no such row")
    workload.build(column, TINY).step()
    sites = stats.sites().values()
    counted, expected = sum(site.skipped for site in sites), skipped(list(workload.products(TINY)), column)
    assert sum(site.lost for site in sites) == 0
    if workload.name.startswith("opennmt"):
        # The first step's feed comes from nowhere and is not dropped.
        assert 0.85 * expected <= counted <= expected
    else:
        assert counted == expected


def multiply_adds(name: str, column: str) -> float:
    """Millions of multiply-adds per row of FP, at full scale."""
    products = WORKLOADS[name].products(Setup())
    return sum(p.kept(column) * p.outputs * p.count for p in products) / 1e6


def test_full_shapes_are_the_papers() -> None:
    medium, large = (dict(WORKLOADS[name].sizes(Setup())) for name in ("zaremba-medium", "zaremba-large"))
    assert (medium["hidden"], medium["p"], medium["clip"]) == (650, 0.5, 5.0)
    assert (large["hidden"], large["p"], large["clip"]) == (1500, 0.65, 10.0)
    assert (medium["batch"], medium["steps"], medium["vocabulary"]) == (20, 35, 10_000)
    # As counted on the unmodified repository.
    assert multiply_adds("awd-lstm", STOCK) == pytest.approx(24.2, abs=0.05)
    assert multiply_adds("awd-lstm", NR_RH_ST) == pytest.approx(14.5, abs=0.05)
    assert NR_ST not in WORKLOADS["awd-lstm"].columns


def test_sentence_lengths_are_those_of_a_typical_batch() -> None:
    sizes = ner.Sizes()
    drawn = ner.lengths(sizes, 1)
    assert drawn == ner.lengths(sizes, 1) != ner.lengths(sizes, 2)
    assert len(drawn) == sizes.batch and list(drawn) == sorted(drawn, reverse=True)
    assert sum(drawn) / sizes.batch == pytest.approx(sizes.mean_length, abs=0.5)
    assert drawn[-1] >= 1 and drawn[0] <= sizes.longest
    for product in WORKLOADS["ner"].products(Setup()):
        assert sum(product.rows) == sum(drawn)


HOST_MODEL = """
import torch
class RNNModel(torch.nn.Module):
    def __init__(self, rnn_type, ntoken, ninp, nhid, nlayers, dropout, dropouth, dropouti, dropoute, wdrop, tied):
        super().__init__()
        print("built")
        widths = [ninp] + [nhid] * (nlayers - 1) + [ninp]
        self.encoder = torch.nn.Embedding(ntoken, ninp)
        self.rnns = torch.nn.ModuleList(torch.nn.LSTM(a, b) for a, b in zip(widths, widths[1:]))
        self.decoder = torch.nn.Linear(ninp, ntoken)
    def forward(self, tokens, hidden, return_h):
        x, states, raws = self.encoder(tokens), [], []
        for rnn, state in zip(self.rnns, hidden):
            x, state = rnn(x, state)
            states.append(state)
            raws.append(x)
        return x.flatten(0, 1), states, raws, raws
"""
HOST_CRITERION = """
import torch
class SplitCrossEntropyLoss(torch.nn.Module):
    def __init__(self, hidden_size, splits, verbose):
        super().__init__()
    def forward(self, weight, bias, hiddens, targets):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hiddens, weight, bias), targets)
"""


def test_a_checkout_of_awd_lstm_is_the_stock_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(HOST_MODEL)
    (tmp_path / "splitcross.py").write_text(HOST_CRITERION)
    setup = replace(TINY, hosts={awd_lstm.NAME: tmp_path})
    workload = WORKLOADS[awd_lstm.NAME]
    training = workload.build(STOCK, setup)
    assert type(training.model).__name__ == "RNNModel"
    assert training.step().isfinite()
    assert "the checkout of salesforce/awd-lstm-lm" in workload.note(setup)
    assert isinstance(workload.build(DENSE, setup).model, awd_lstm.AWDModel)
    assert capsys.readouterr().out == ""


def test_a_checkout_that_fails_is_told_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise RuntimeError('no')\n")
    setup = replace(TINY, hosts={awd_lstm.NAME: tmp_path})
    workload = WORKLOADS[awd_lstm.NAME]
    assert isinstance(workload.build(STOCK, setup).model, awd_lstm.AWDModel)
    assert "a stand-in, since the checkout failed (RuntimeError)" in workload.note(setup)


def test_the_table_says_whose_translator_was_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = WORKLOADS["opennmt-deen"]
    monkeypatch.setattr(opennmt_host, "version", lambda: "3.5.1")
    assert "OpenNMT-py 3.5.1's own model" in workload.note(TINY)
    monkeypatch.setattr(opennmt_host, "version", lambda: None)
    assert "stand-in" in workload.note(TINY) and workload.sizes(TINY)["host"] == "stand-in"
