"""However weights change between two forward passes, the next one uses the new ones; graphs may be used twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sd_plugin import StructuredDropoutLSTM
from sd_plugin.functional import linear

from ..tolerances import assert_close


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def swapped(module: nn.Module) -> None:
    # As OpenNMT-py's moving average does for validation.
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.5


def loaded(module: nn.Module) -> None:
    module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})


def by_an_optimizer(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = -0.5 * parameter.detach()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    module.zero_grad()


CHANGES = [in_place, through_data, swapped, loaded, by_an_optimizer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_used(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    lstm = StructuredDropoutLSTM(20, 24, num_layers=2, native=False)
    x = torch.randn(4, 3, 20)
    before = lstm(x)[0]
    change(lstm)
    fresh = nn.LSTM(20, 24, num_layers=2)
    fresh.load_state_dict(lstm.state_dict())
    after = lstm(x)[0]
    assert not torch.allclose(before, after, atol=1e-3)
    assert_close(after, fresh(x)[0])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_projection_is_used(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 30), torch.randn(5, 20)
    linear(x, layer.weight, layer.bias, native=False)
    change(layer)
    got = linear(x, layer.weight, layer.bias, native=False)
    assert_close(got, layer(x))


def test_a_graph_may_be_walked_twice() -> None:
    torch.manual_seed(0)
    lstm = StructuredDropoutLSTM(20, 24, recurrent_dropout=0.5, input_dropout=0.5)
    loss = lstm(torch.randn(4, 3, 20))[0].sum()
    loss.backward(retain_graph=True)
    once = [copy.deepcopy(parameter.grad) for parameter in lstm.parameters()]
    loss.backward()
    for parameter, grad in zip(lstm.parameters(), once, strict=True):
        assert grad is not None
        assert_close(parameter.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
