"""Subclasses of nn.LSTM and nn.Dropout: those that compute what these do are structured, all others are torch's own."""

from __future__ import annotations

import copy
import gc
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

import sd_plugin
from sd_plugin import StructuredDropout, StructuredDropoutLSTM, hints, stats

pytestmark = pytest.mark.usefixtures("unpatched")

K = 16


class Recurrent(ABC, nn.RNNBase):
    """As pytorch-forecasting has it: what is common to its LSTM and its GRU, forward included."""

    @abstractmethod
    def init_hidden_state(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=self.batch_first)
        output, state = super().forward(packed, hx=hx)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=self.batch_first)[0], state


class Forecasting(Recurrent, nn.LSTM):
    def init_hidden_state(self, x: Tensor) -> Any:
        return None


class Renamed(nn.LSTM):
    """A name, options and helpers of its own."""

    def __init__(self, size: int, layers: int, **options: Any) -> None:
        super().__init__(size, size, layers, **options)
        self.scale = 2.0
        self.register_buffer("calls", torch.zeros(()))

    def extra_repr(self) -> str:
        return f"scale={self.scale}"

    @property
    def doubled(self) -> int:
        return 2 * self.hidden_size


class Louder(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return nn.LSTM.forward(self, input * 2, hx)


class Retried(nn.LSTM):
    """The call stands in a function inside."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        def call() -> Any:
            return super(Retried, self).forward(input, hx)

        return call()


class WeightDrop(nn.LSTM):
    """Weights that are computed at each call, the old way: from a parameter of another name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        raw = self._parameters.pop("weight_hh_l0")
        self.register_parameter("raw", raw)

    def forward(self, input: Any, hx: Any = None) -> Any:
        self.__dict__["weight_hh_l0"] = self.raw * 0.5
        self._flat_weights[self._flat_weights_names.index("weight_hh_l0")] = self.weight_hh_l0
        return super().forward(input, hx)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Forecasting(K, K, 2, dropout=p),
        lambda p: Renamed(K, 2, dropout=p),
        lambda p: Louder(K, K, 2, dropout=p),
        lambda p: Retried(K, K, 2, dropout=p),
    ],
    ids=["pytorch-forecasting", "renamed", "louder", "inner function"],
)
def test_a_subclass_that_passes_on_to_torch_is_structured(make: Any) -> None:
    sd_plugin.enable("torch_nn")
    lstm, drop, x = make(0.5), nn.Dropout(0.5), torch.randn(5, 3, K)
    y, _ = lstm(drop(x))
    nn.Linear(K, 2)(drop(y)).sum().backward()
    sites = stats.sites()
    assert {"lstm 16x16.l0.recurrent", "lstm 16x16.l1.input", "lstm 16x16.l1.recurrent", "dropout 16"} == set(sites)
    assert all(parameter.grad is not None for parameter in lstm.parameters())
    # The louder one's input is another tensor than what was dropped.
    assert sites["dropout 16"].lost == isinstance(lstm, Louder)


@pytest.mark.parametrize(
    "make",
    [lambda p: Forecasting(K, K, 2, dropout=p), lambda p: Louder(K, K, 2, dropout=p), lambda p: Renamed(K, 2)],
)
def test_a_subclass_computes_what_it_does_in_torch(make: Any) -> None:
    lstm, x = make(0.0), torch.randn(5, 3, K)
    expected, (h, c) = lstm(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(lstm.parameters()))
    sd_plugin.enable("torch_nn", recurrent_dropout=0.01)
    found, states = lstm(x)
    assert stats.sites(), "round(0.99 · 16) = 16 units are kept: all of this library runs"
    gradients = torch.autograd.grad(found.square().sum(), list(lstm.parameters()))
    torch.testing.assert_close((found, states), (expected, (h, c)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


def test_a_packed_subclass_skips() -> None:
    sd_plugin.enable("torch_nn")
    lstm = Forecasting(K, K, batch_first=True)
    lstm(nn.Dropout(0.3)(torch.randn(3, 5, K)), lengths=torch.tensor([5, 4, 1]))[0].sum().backward()
    assert set(stats.sites()) == {"dropout 16", "lstm 16x16.l0.recurrent"}
    assert all(site.lost == 0 and site.skipped > 0 for site in stats.sites().values())


def test_weights_that_forward_computes_are_those_that_count() -> None:
    lstm, x = WeightDrop(K, K), torch.randn(5, 3, K)
    expected, _ = lstm(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(lstm.parameters()))
    sd_plugin.enable("torch_nn", recurrent_dropout=0.01)
    found, _ = lstm(x)
    assert stats.sites()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), list(lstm.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


class OwnPermutation(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        return super().permute_hidden(hx, permutation)


class OwnCheck(nn.LSTM):
    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        pass


class OwnWeights(nn.LSTM):
    @property
    def weight_hh_l1(self) -> Tensor:
        if "weight_hh_l1" not in self._parameters:
            raise AttributeError("not made yet")
        return self._parameters["weight_hh_l1"].clamp(-0.1, 0.1)


class OwnLookup(nn.LSTM):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Mixin:
    def _update_flat_weights(self) -> None:
        pass


class Mixed(Mixin, nn.LSTM):
    pass


def parametrized() -> nn.LSTM:
    lstm = nn.LSTM(K, K, 2, dropout=0.5)
    parametrize.register_parametrization(lstm, "weight_hh_l0", nn.Tanh())
    return lstm


def parametrized_subclass() -> nn.LSTM:
    lstm = Renamed(K, 2, dropout=0.5)
    parametrize.register_parametrization(lstm, "bias_hh_l1", nn.Tanh())
    return lstm


OTHERS = [
    *(lambda cls=cls: cls(K, K, 2, dropout=0.5) for cls in (OwnPermutation, OwnCheck, OwnWeights, OwnLookup, Mixed)),
    parametrized,
    parametrized_subclass,
    lambda: Forecasting(K, K, 2, dropout=0.5, proj_size=4),
]


@pytest.mark.parametrize("make", OTHERS)
def test_a_subclass_that_has_changed_more_is_torchs_own(make: Any) -> None:
    rnn, x = make(), torch.randn(4, 3, K)
    torch.manual_seed(2)
    expected, _ = rnn(x)
    sd_plugin.enable("torch_nn")
    torch.manual_seed(2)
    found, _ = rnn(x)
    assert torch.equal(found, expected)
    assert hints.lookup(nn.Dropout(0.5)(x)) is None, "nor is it worth dropping units for"
    assert not stats.sites()


class HandWritten(nn.LSTM):
    """All of its own."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return input.tanh(), None


def test_a_layer_that_never_calls_torchs_is_not_worth_dropping_units_for() -> None:
    sd_plugin.enable("torch_nn")
    lstm = HandWritten(K, K)
    assert hints.lookup(nn.Dropout(0.5)(torch.randn(4, 3, K))) is None
    del lstm


def test_this_librarys_own_lstm_is_left_alone() -> None:
    sd_plugin.enable("torch_nn")
    lstm = StructuredDropoutLSTM(K, K, 2, dropout=0.5, mode="random")
    y, _ = lstm(torch.randn(4, 3, K))
    assert isinstance(y, Tensor) and not stats.sites()
    y, _ = lstm(nn.Dropout(0.5)(torch.randn(4, 3, K)))
    assert stats.sites()["dropout 16"].used == 1, "it takes hints, so dropouts of its width are structured"


def test_a_layout_that_is_set_later_counts_from_the_next_call() -> None:
    sd_plugin.enable("torch_nn")
    lstm, drop = nn.LSTM(K, K), nn.Dropout(0.5)
    lstm(drop(torch.randn(4, 3, K)))
    lstm.batch_first = True
    lstm(torch.randn(3, 4, K))
    lstm(drop(torch.randn(3, 4, K)))
    assert stats.sites()["dropout 16"].lost == 0


def test_an_lstm_parametrized_later_counts_no_more_from_its_next_call() -> None:
    sd_plugin.enable("torch_nn")
    lstm, drop = nn.LSTM(K, K), nn.Dropout(0.5)
    lstm(drop(torch.randn(4, 3, K)))
    parametrize.register_parametrization(lstm, "weight_hh_l0", nn.Tanh())
    lstm(torch.randn(4, 3, K))
    assert hints.lookup(drop(torch.randn(4, 3, K))) is None


def test_many_lstms_come_and_go() -> None:
    sd_plugin.enable("torch_nn")
    drop, x = nn.Dropout(0.5), torch.randn(4, 3, K)
    for _ in range(20):
        model = nn.ModuleList([nn.LSTM(K, K), Renamed(K, 1)])
        assert hints.lookup(drop(x)) is not None
        twin = copy.deepcopy(model)
        del model
        assert hints.lookup(drop(x)) is not None
        del twin
        assert hints.lookup(drop(x)) is None


class NamedDropout(nn.Dropout):
    """What it is called is all it adds."""

    def extra_repr(self) -> str:
        return "named"


class MaskDropout(nn.Dropout):
    """Gives `nn.Dropout` a mask instead of an activation."""

    def forward(self, input: Tensor) -> Tensor:
        return input * super().forward(torch.ones_like(input[:1]))


class Scheduled(nn.Dropout):
    @property
    def p(self) -> float:
        return 0.5

    @p.setter
    def p(self, value: float) -> None:
        pass


def test_a_dropout_of_another_name_is_structured() -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(K, K)
    lstm(NamedDropout(0.5)(torch.randn(4, 3, K)))
    assert stats.sites()["dropout 16"].used == 1


@pytest.mark.parametrize("cls", [MaskDropout, Scheduled])
def test_a_dropout_that_has_changed_more_is_torchs_own(cls: Any) -> None:
    drop, x, lstm = cls(0.5), torch.randn(4, 3, K), nn.LSTM(K, K)
    torch.manual_seed(2)
    expected = drop(x)
    sd_plugin.enable("torch_nn")
    torch.manual_seed(2)
    assert torch.equal(drop(x), expected)
    assert not stats.sites()
    del lstm


def test_this_librarys_own_dropout_is_left_alone() -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(K, K)
    y, _ = lstm(StructuredDropout(0.5, site="own")(torch.randn(4, 3, K)))
    assert not isinstance(y, PackedSequence) and stats.sites()["own"].drawn == 1


def test_lstms_may_be_collected_while_the_others_are_looked_through() -> None:
    """The collector runs whenever enough was made, and what it finds then is forgotten at once."""
    sd_plugin.enable("torch_nn")
    drop, x = nn.Dropout(0.5), torch.randn(2, 3, K)
    drop(x)
    before = gc.get_threshold()
    gc.collect()
    # All that is there already is not looked through again.
    gc.freeze()
    try:
        for threshold in range(1, 500):
            gc.collect()
            gc.disable()
            gone = nn.LSTM(K, K)
            gone.cycle = [gone]
            del gone
            gc.set_threshold(threshold)
            gc.enable()
            drop(x)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
