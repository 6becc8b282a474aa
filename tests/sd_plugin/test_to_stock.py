"""`to_stock`, the inverse of `convert`: torch's classes on the same objects, with nothing of ours left."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sd_plugin import (
    FusedCrossEntropyLoss,
    StackedStructuredLSTM,
    StructuredDropout,
    StructuredDropoutLSTM,
    StructuredLinear,
    convert,
    stats,
    to_stock,
)

TOKENS = torch.arange(10).view(5, 2)


class Ours(nn.Module):
    """A language model of this library's modules."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.drop = StructuredDropout(p, batch_first=False, sampling="bernoulli", site="words")
        self.lstm = StructuredDropoutLSTM(4, 6, 2, dropout=p, recurrent_dropout=p, output_dropout=p, site="rnn")
        self.projection = StructuredLinear(6, 10)
        self.loss = FusedCrossEntropyLoss(label_smoothing=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.lstm(self.drop(self.embedding(tokens)))
        scores = self.projection(y)
        loss: Tensor = self.loss(scores.flatten(0, 1), tokens.flatten())
        return loss


class Stock(nn.Module):
    """The same of torch's."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.drop = nn.Dropout(p)
        self.lstm = nn.LSTM(4, 6, 2, dropout=p)
        self.projection = nn.Linear(6, 10)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    forward = Ours.forward


def assert_alike(found: nn.Module, expected: nn.Module) -> None:
    """The same tree of modules: classes, attributes and their types."""
    for (name, ours), (other, stock) in zip(found.named_modules(), expected.named_modules(), strict=True):
        assert name == other
        if name:
            assert type(ours) is type(stock), name
        assert vars(ours).keys() == vars(stock).keys(), name
        assert {k: type(v) for k, v in vars(ours).items()} == {k: type(v) for k, v in vars(stock).items()}, name


def train(model: nn.Module, seed: int = 1) -> list[Tensor]:
    """One step's loss and gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(TOKENS)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_model_of_ours_is_one_of_torchs() -> None:
    torch.manual_seed(0)
    model, stock = Ours(), Stock()
    objects = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    before = train(model)
    assert stats.sites()
    assert to_stock(model) is model
    assert dict(model.named_modules()) == objects
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is p for name, p in parameters.items())
    assert_alike(model, stock)
    assert repr(model).replace("Ours", "Stock") == repr(stock)
    # It trains as torch's from the same seed, and drops at random.
    stock.load_state_dict(model.state_dict())
    stats.reset()
    found, expected = train(model), train(stock)
    assert not stats.sites()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(found[0], before[0])


@given(
    p=st.floats(0, 0.9), layers=st.integers(1, 3), bidirectional=st.booleans(), bias=st.booleans(),
    batch_first=st.booleans(), training=st.booleans(), mode=st.sampled_from(["random", "nr_rh_st"]),
)  # fmt: skip
def test_converting_and_back_is_nothing(p: float, mode: str, layers: int, training: bool, **options: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, layers, dropout=p if layers > 1 else 0.0, **options).train(training)
    before = dict(vars(lstm))
    twin, x = copy.deepcopy(lstm), torch.randn(5, 5, 3)
    convert(lstm, recurrent_dropout=p, output_dropout=p, mode=mode, locked=True)
    assert type(lstm) is StructuredDropoutLSTM
    assert to_stock(lstm) is lstm
    assert type(lstm) is nn.LSTM
    assert vars(lstm) == before
    torch.manual_seed(1)
    expected = twin(x)[0]
    torch.manual_seed(1)
    assert torch.equal(lstm(x)[0], expected)
    assert type(pickle.loads(pickle.dumps(lstm))) is nn.LSTM


def test_hooks_flags_and_optimizers_go_along() -> None:
    model, calls = Ours(), []
    for part in (model.lstm, model.drop, model.projection):
        part.register_forward_hook(lambda module, *_: calls.append(type(module)))
    model.projection.eval()
    optimizer = torch.optim.Adam(model.parameters())
    to_stock(model)
    assert model.lstm.training and not model.projection.training
    before = model.lstm.weight_hh_l1.detach().clone()
    train(model)
    optimizer.step()
    assert not torch.equal(model.lstm.weight_hh_l1, before)
    assert calls == [nn.Dropout, nn.LSTM, nn.Linear]


@pytest.mark.parametrize("made", [StructuredDropoutLSTM, StructuredLinear])
def test_one_module_by_itself(made: Any) -> None:
    module = made(3, 4)
    assert type(to_stock(module)) is {StructuredDropoutLSTM: nn.LSTM, StructuredLinear: nn.Linear}[made]


def test_what_is_torchs_already_stays() -> None:
    model = Stock()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert to_stock(to_stock(model)) is model
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_subclasses_are_left_alone_and_named() -> None:
    class Own(StructuredLinear):
        """A forward pass of its own."""

    model = nn.ModuleDict({"first": Own(2, 3), "second": StructuredLinear(2, 3)})
    with pytest.warns(UserWarning, match=r"to_stock left alone: first \(Own is a subclass of one of ours\)"):
        to_stock(model)
    assert [type(module) for module in model.values()] == [Own, nn.Linear]


def test_a_parametrized_module_stays_parametrized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(convert(nn.LSTM(3, 4), recurrent_dropout=0.5))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    expected = model.eval()(x)[0]
    to_stock(model)
    lstm: Any = model[0]
    assert isinstance(lstm, nn.LSTM) and not isinstance(lstm, StructuredDropoutLSTM)
    assert type(lstm).__name__ == "ParametrizedLSTM"
    torch.testing.assert_close(model(x)[0], expected)
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert type(lstm) is nn.LSTM
    torch.testing.assert_close(model(x)[0], expected)


def test_the_stack_of_cells_needs_opennmt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"lstm": StructuredDropoutLSTM(2, 3), "cells": StackedStructuredLSTM(2, 3, 4, 0.5)})
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "onmt.modules.stacked_rnn", None)
    told = r"^cells is a StackedStructuredLSTM, whose stock class is the StackedLSTM of OpenNMT-py, which cannot be"
    with pytest.raises(TypeError, match=told):
        to_stock(model)
    # Nothing was changed.
    assert type(model["lstm"]) is StructuredDropoutLSTM


def test_the_stack_of_cells_is_opennmts() -> None:
    try:
        from onmt.modules.stacked_rnn import StackedLSTM
    except ImportError as error:
        pytest.skip(f"OpenNMT-py cannot be imported: {error}")
    ours, stock = StackedStructuredLSTM(2, 3, 4, 0.5, recurrent_dropout=0.5).eval(), StackedLSTM(2, 3, 4, 0.5).eval()
    stock.load_state_dict(ours.state_dict())
    x, state = torch.randn(6, 3), (torch.randn(2, 6, 4), torch.randn(2, 6, 4))
    expected = ours(x, state)
    assert type(to_stock(ours)) is StackedLSTM
    assert_alike(ours, stock)
    for module in (ours, stock):
        y, (h, c) = module(x, state)
        torch.testing.assert_close([y, h, c], [expected[0], *expected[1]])


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="this torch has no quantized products")
def test_quantization_says_what_it_leaves_and_finds_what_is_torchs() -> None:
    dynamic, kinds = torch.ao.nn.quantized.dynamic, {nn.LSTM, nn.Linear}
    model = Ours().eval()
    del model.loss
    told = r"quantization knows torch's classes by name and leaves this {}: sd_plugin\.to_stock\(model\) first"
    with pytest.warns(UserWarning, match=told.format("StructuredDropoutLSTM")):
        left = torch.ao.quantization.quantize_dynamic(model, kinds)
    assert type(left.lstm) is StructuredDropoutLSTM and type(left.projection) is StructuredLinear
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = torch.ao.quantization.quantize_dynamic(to_stock(model), kinds)
    assert not [warning for warning in caught if "to_stock" in str(warning.message)]
    assert type(quantized.lstm) is dynamic.LSTM and type(quantized.projection) is dynamic.Linear
