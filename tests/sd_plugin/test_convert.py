"""`convert` on models with LSTMs in every place, and what must stay as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sd_plugin import StructuredDropoutLSTM, convert, stats


class Model(nn.Module):
    """An embedding, two LSTMs in containers, a projection."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.first = nn.ModuleDict({"encode": nn.LSTM(4, 6, 2, dropout=dropout, batch_first=True)})
        self.second = nn.Sequential(nn.LSTM(6, 5, bidirectional=True))
        self.projection = nn.Linear(10, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.first["encode"](self.embedding(tokens))
        y, _ = self.second(x)
        return self.projection(y)


def lstms(model: nn.Module) -> dict[str, nn.LSTM]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.LSTM)}


def test_lstms_anywhere_are_replaced_on_their_own_parameters() -> None:
    model = Model(dropout=0.25)
    before = dict(model.named_parameters())
    expected = model.eval()(torch.arange(10).view(5, 2))
    model.train()

    assert convert(model, recurrent_dropout=0.5, locked=True) is model

    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    found = lstms(model)
    assert list(found) == ["first.encode", "second.0"]
    for name, lstm in found.items():
        assert type(lstm) is StructuredDropoutLSTM
        assert (lstm.recurrent_dropout, lstm.locked, lstm.site) == (0.5, True, name)
    first, second = found.values()
    assert (first.dropout, first.batch_first, first.num_layers) == (0.25, True, 2)
    assert second.bidirectional
    assert torch.equal(model.eval()(torch.arange(10).view(5, 2)), expected)


@given(p=st.floats(0.1, 0.6), mode=st.sampled_from(["random", "nr_rh_st"]), seed=st.integers(0, 10**6))
def test_an_optimizer_made_before_goes_on(p: float, mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    tokens = torch.randint(0, 10, (5, 2))
    model(tokens).square().sum().backward()
    optimizer.step()
    steps = {id(parameter): state["step"].clone() for parameter, state in optimizer.state.items()}

    convert(model, recurrent_dropout=p, mode=mode)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    model(tokens).square().sum().backward()
    optimizer.step()

    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter]["step"] == steps[id(parameter)] + 1
        if "embedding" not in name:
            assert not torch.equal(parameter, before[name]), name
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(tokens), model.eval()(tokens))


def test_a_shared_lstm_stays_shared() -> None:
    shared = nn.LSTM(4, 4)
    model = nn.Module()
    model.first, model.second = shared, shared
    model.inner = nn.ModuleList([nn.Sequential(shared), shared])
    convert(model)
    assert type(model.first) is StructuredDropoutLSTM
    assert model.second is model.first
    assert model.inner[0][0] is model.first
    assert model.inner[1] is model.first


def test_hooks_and_training_flag_go_along() -> None:
    model = Model()
    calls: list[str] = []
    lstm = model.second[0]
    lstm.register_forward_hook(lambda *_: calls.append("after"))
    lstm.register_forward_pre_hook(lambda *_: calls.append("before"))
    lstm.eval()
    convert(model)
    model(torch.zeros(3, 2, dtype=torch.long))
    assert calls == ["before", "after"]
    assert not model.second[0].training
    assert model.first["encode"].training


def test_an_lstm_itself_is_converted_in_place() -> None:
    lstm: Any = nn.LSTM(4, 6)
    weight, calls = lstm.weight_hh_l0, []
    handle = lstm.register_forward_hook(lambda *_: calls.append("called"))
    assert convert(lstm, recurrent_dropout=0.5) is lstm
    assert type(lstm) is StructuredDropoutLSTM
    assert lstm.weight_hh_l0 is weight
    assert lstm.site == "lstm"
    handle.remove()
    lstm(torch.zeros(2, 1, 4))
    assert not calls


def test_converting_again_configures_anew() -> None:
    model = nn.Sequential(nn.LSTM(4, 6))
    convert(model, recurrent_dropout=0.5)
    convert(model, recurrent_dropout=0.25, mode="nr_rh_st")
    assert model[0].recurrent_dropout == 0.25
    with pytest.raises(TypeError, match="unknown option recurent_dropout; valid: recurrent_dropout"):
        convert(model, recurent_dropout=0.1)


def test_subclasses_and_what_they_hold_stay_untouched() -> None:
    class Own(nn.LSTM):
        """A forward pass of its own."""

    model = nn.Sequential(Own(4, 4), nn.LSTM(4, 4))
    with pytest.warns(UserWarning, match=r"^sd_plugin\.convert left alone: 0 \(Own is a subclass of LSTM\)$"):
        convert(model)
    assert type(model[0]) is Own
    assert type(model[1]) is StructuredDropoutLSTM
    with pytest.raises(ValueError, match=r"holds no nn\.LSTM to convert; left alone: 0 \(Own is a subclass of LSTM\)"):
        convert(nn.Sequential(Own(4, 4)))


def test_nothing_is_said_where_nothing_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Model(), recurrent_dropout=0.5)


def test_a_parametrized_lstm_is_left_alone_and_the_order_that_works_is_named() -> None:
    model = nn.ModuleDict({"first": nn.LSTM(4, 4), "second": nn.LSTM(4, 4)})
    parametrizations.weight_norm(model["first"], "weight_hh_l0")
    with pytest.warns(UserWarning, match=r"first \(parametrized already: convert first, then parametrize\)"):
        convert(model)
    assert not isinstance(model["first"], StructuredDropoutLSTM)
    assert type(model["second"]) is StructuredDropoutLSTM


def twin(lstm: Any) -> Any:
    """A converted LSTM that has as its own what are made weights in ``lstm``."""
    plain: Any = convert(nn.LSTM(4, 6, 2, dropout=0.5).double(), recurrent_dropout=0.5)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(getattr(lstm, name))
    return plain.train(lstm.training)


@pytest.mark.parametrize(
    "register",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
    ids=lambda register: register.__name__,
)
def test_convert_then_parametrize_trains(register: Callable[..., nn.Module]) -> None:
    """With dropout on: the products use the weight that the parametrization makes, and its own parameters learn."""
    torch.manual_seed(0)
    lstm: Any = convert(nn.LSTM(4, 6, 2, dropout=0.5).double(), recurrent_dropout=0.5)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        register(lstm, name)
    before = {name: p.detach().clone() for name, p in lstm.named_parameters() if "parametrizations" in name}
    x, optimizer = torch.randn(5, 3, 4, dtype=torch.float64), torch.optim.SGD(lstm.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        # Some make another weight whenever they are asked in training.
        with parametrize.cached():
            torch.manual_seed(step)
            y = lstm(x)[0]
            plain = twin(lstm)
            torch.manual_seed(step)
            torch.testing.assert_close(y, plain(x)[0])
            y.square().sum().backward()
        optimizer.step()
    assert stats.sites()["lstm.l0.recurrent"].skipped > 0
    after = dict(lstm.named_parameters())
    assert before and all(not torch.equal(after[name], p) for name, p in before.items())
    torch.testing.assert_close(lstm.eval()(x)[0], twin(lstm)(x)[0])


def test_one_that_was_parametrized_after_it_was_converted_is_configured_anew() -> None:
    lstm: Any = convert(nn.LSTM(4, 4), recurrent_dropout=0.5)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    kind = type(lstm)
    convert(lstm, recurrent_dropout=0.25)
    assert type(lstm) is kind and lstm.recurrent_dropout == 0.25


def test_a_model_without_an_lstm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear holds no nn\.LSTM to convert"):
        convert(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"recurrent_dropout": 1.0}, ValueError, "recurrent_dropout"),
        ({"mode": "nr_st", "recurrent_dropout": 0.5}, ValueError, "nr_st"),
        ({"mode": "all"}, ValueError, "mode"),
        ({"sampling": "all"}, ValueError, "sampling"),
        ({"recurent_dropout": 0.5}, TypeError, "recurent_dropout"),
    ],
)
def test_a_wrong_option_replaces_nothing(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = Model()
    with pytest.raises(error, match=words):
        convert(model, **options)
    assert all(type(lstm) is nn.LSTM for lstm in lstms(model).values())


def test_an_lstm_that_cannot_be_converted_replaces_nothing() -> None:
    model = nn.Sequential(nn.LSTM(4, 6), nn.LSTM(6, 6, proj_size=2))
    with pytest.raises(NotImplementedError, match="proj_size"):
        convert(model)
    assert type(model[0]) is nn.LSTM


def test_sites_in_the_report_are_the_modules_names() -> None:
    model = convert(Model(), recurrent_dropout=0.5)
    model(torch.zeros(3, 2, dtype=torch.long)).sum().backward()
    assert set(stats.sites()) == {
        "first.encode.l0.recurrent", "first.encode.l1.recurrent", "second.0.l0.recurrent",
        "second.0.l0_reverse.recurrent",
    }  # fmt: skip
    stats.reset()
    convert(Model(), recurrent_dropout=0.5, site="mine").second(torch.zeros(3, 2, 6))
    assert set(stats.sites()) == {"mine.l0.recurrent", "mine.l0_reverse.recurrent"}
