"""One call of a host's `nn.LSTM` with structured dropout: the same numbers as a module of its own, and no trace."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from sd_plugin import StructuredDropoutLSTM
from sd_plugin.patches._lstm import stock, structured

from ..tolerances import assert_close

T, B, I, H = 4, 3, 5, 6  # noqa: E741 - as in the equations


def make(layers: int = 1, **options: bool) -> tuple[nn.LSTM, Tensor, tuple[Tensor, Tensor]]:
    """A layer, an input and a state, in float64."""
    torch.manual_seed(0)
    directions = 2 if options.get("bidirectional") else 1
    lstm = nn.LSTM(I, H, layers, dtype=torch.float64, **options)
    states = torch.randn(2, layers * directions, B, H, dtype=torch.float64)
    return lstm, torch.randn(T, B, I, dtype=torch.float64), (states[0], states[1])


def gradients(y: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.cos(torch.arange(y.numel()).view_as(y))).sum(), wanted)


def traces(lstm: nn.LSTM) -> list[object]:
    """Everything about a module that a call could leave something in, by identity."""
    containers = [value for value in vars(lstm).values() if isinstance(value, (dict, list))]
    held = [item for box in containers for item in (box.values() if isinstance(box, dict) else box)]
    return [type(lstm), *(f"{name} {id(value)}" for name, value in vars(lstm).items()), *map(id, held)]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}, {"batch_first": True}])
def test_without_dropout_it_is_the_lstm_itself(options: dict[str, bool]) -> None:
    lstm, x, state = make(layers=2, **options)
    x = x.transpose(0, 1) if lstm.batch_first else x
    expected, (h, c) = lstm(x, state)
    for module in (stock(lstm), structured(lstm, mode="nr_rh_st")):
        y, states = module.forward(x, state)
        assert torch.equal(y, expected)
        assert torch.equal(states[0], h) and torch.equal(states[1], c)
        for got, wanted in zip(gradients(y, *lstm.parameters()), gradients(expected, *lstm.parameters()), strict=True):
            assert torch.equal(got, wanted)
        expected, _ = lstm(x, state)


def test_it_drops_as_a_module_of_its_own_does() -> None:
    lstm, x, state = make()
    own = StructuredDropoutLSTM(I, H, recurrent_dropout=0.5, dtype=torch.float64)
    own.load_state_dict(lstm.state_dict())
    torch.manual_seed(1)
    expected, _ = own(x, state)
    torch.manual_seed(1)
    y, _ = structured(lstm, recurrent_dropout=0.5).forward(x, state)
    assert torch.equal(y, expected)
    assert not torch.allclose(y, lstm(x, state)[0])
    for got, wanted in zip(gradients(y, *lstm.parameters()), gradients(expected, *own.parameters()), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_given_weights_take_the_place_of_its_own(dropout: float, training: bool) -> None:
    lstm, x, state = make()
    lstm.train(training)
    given = torch.randn_like(lstm.weight_hh_l0, requires_grad=True)
    other = copy.deepcopy(lstm)
    other.weight_hh_l0 = nn.Parameter(given.detach().clone())
    torch.manual_seed(1)
    expected, _ = structured(other, recurrent_dropout=dropout).forward(x, state)
    torch.manual_seed(1)
    # A computed weight, as weight drop makes it: no parameter, no leaf.
    y, _ = structured(lstm, {"weight_hh_l0": given * 1.0}, recurrent_dropout=dropout).forward(x, state)
    assert torch.equal(y, expected)
    (got,), (wanted,) = gradients(y, given), gradients(expected, other.weight_hh_l0)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("looked_up_again", [True, False])
def test_a_given_weight_may_have_no_parameter_beside_it(looked_up_again: bool) -> None:
    """As in a host that has taken the parameter out and keeps it under another name."""
    lstm, x, state = make()
    other = copy.deepcopy(lstm)
    given = torch.randn_like(lstm.weight_hh_l0)
    other.weight_hh_l0 = nn.Parameter(given.clone())
    expected, _ = other(x, state)
    del lstm._parameters["weight_hh_l0"]
    if looked_up_again:
        lstm.float().double()  # torch's own list of weights is made anew
        lstm.load_state_dict(other.state_dict(), strict=False)
    for module in (stock(lstm, {"weight_hh_l0": given}), structured(lstm, {"weight_hh_l0": given}, native=False)):
        assert_close(module.forward(x, state)[0], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_call_leaves_no_trace(dropout: float) -> None:
    lstm, x, state = make()
    before = traces(lstm)
    weight = lstm.weight_hh_l0 * 0.5
    module = structured(lstm, {"weight_hh_l0": weight}, recurrent_dropout=dropout)
    module.forward(x, state)[0].sum().backward()
    stock(lstm, {"weight_hh_l0": weight}).forward(x, state)
    assert traces(lstm) == before
    assert len(list(lstm.parameters())) == 4
    file = io.BytesIO()
    torch.save(lstm, file)
    assert b"sd_plugin" not in file.getvalue()


def test_parameters_are_shared_not_copied() -> None:
    lstm, x, state = make()
    module = structured(lstm, recurrent_dropout=0.5)
    assert [id(parameter) for parameter in module.parameters()] == [id(parameter) for parameter in lstm.parameters()]
    module.forward(x, state)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())


def test_a_given_weight_does_not_become_a_parameter() -> None:
    lstm, _, _ = make()
    module = structured(lstm, {"weight_hh_l0": nn.Parameter(torch.zeros_like(lstm.weight_hh_l0))})
    assert {name for name, _ in module.named_parameters()} == {"weight_ih_l0", "bias_ih_l0", "bias_hh_l0"}


def test_hooks_of_the_lstm_do_not_run() -> None:
    lstm, x, state = make()
    calls: list[nn.Module] = []
    lstm.register_forward_hook(lambda module, *_: calls.append(module))
    structured(lstm, recurrent_dropout=0.5).forward(x, state)
    assert calls == []


def test_it_is_in_the_mode_that_the_lstm_is_in() -> None:
    lstm, x, state = make()
    lstm.eval()
    expected, _ = lstm(x, state)
    assert torch.equal(structured(lstm, recurrent_dropout=0.5).forward(x, state)[0], expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"recurrent_dropout": 1.0}, ValueError),
        ({"mode": "some"}, ValueError),
        ({"sampling": "some"}, ValueError),
        ({"wdrop": 0.5}, TypeError),
    ],
)
def test_wrong_options(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        structured(make()[0], **options)


def test_projections_are_refused() -> None:
    with pytest.raises(NotImplementedError):
        structured(nn.LSTM(4, 4, proj_size=2))
