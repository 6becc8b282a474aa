"""Objects of ours are those of torch in every attribute that torch has: nothing that torch reads is written over."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from sd_plugin import (
    FusedCrossEntropyLoss,
    StackedStructuredLSTM,
    StructuredDropout,
    StructuredDropoutLSTM,
    StructuredLinear,
    convert,
)

OPTIONS: dict[str, Any] = {"recurrent_dropout": 0.5, "output_dropout": 0.25, "locked": True}


def adopted(module: nn.Module, adopt: Callable[..., Any], **options: Any) -> Any:
    """``module`` made one of ours, in place."""
    return adopt(module, **options)


#: ours beside torch's, made the same way, and every public name of torch's class that ours means to define anew
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], set[str]]] = {
    "StructuredDropoutLSTM": (
        lambda: StructuredDropoutLSTM(4, 6, 2, dropout=0.5, **OPTIONS),
        lambda: nn.LSTM(4, 6, 2, dropout=0.5),
        {"forward", "extra_repr"},
    ),
    "converted LSTM": (
        lambda: convert(nn.Sequential(nn.LSTM(4, 6, bidirectional=True)), **OPTIONS)[0],
        lambda: nn.LSTM(4, 6, bidirectional=True),
        {"forward", "extra_repr"},
    ),
    "adopted LSTM": (
        lambda: adopted(nn.LSTM(4, 6, batch_first=True), StructuredDropoutLSTM.adopt, **OPTIONS),
        lambda: nn.LSTM(4, 6, batch_first=True),
        {"forward", "extra_repr"},
    ),
    "shared LSTM": (
        lambda: adopted(nn.LSTM(4, 6, bias=False), StructuredDropoutLSTM.from_lstm, mode="random"),
        lambda: nn.LSTM(4, 6, bias=False),
        {"forward", "extra_repr"},
    ),
    "StructuredLinear": (lambda: StructuredLinear(4, 6), lambda: nn.Linear(4, 6), {"forward"}),
    "adopted Linear": (
        lambda: adopted(nn.Linear(4, 6, bias=False), StructuredLinear.adopt),
        lambda: nn.Linear(4, 6, bias=False),
        {"forward"},
    ),
    "StructuredDropout": (lambda: StructuredDropout(0.3), lambda: nn.Dropout(0.3), {"forward", "extra_repr"}),
    "FusedCrossEntropyLoss": (
        lambda: FusedCrossEntropyLoss(ignore_index=1, reduction="sum", label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss(ignore_index=1, reduction="sum", label_smoothing=0.1),
        {"forward"},
    ),
    "adopted CrossEntropyLoss": (
        lambda: adopted(nn.CrossEntropyLoss(), FusedCrossEntropyLoss.adopt),
        nn.CrossEntropyLoss,
        {"forward"},
    ),
    # OpenNMT-py's own is compared where that is installed.
    "StackedStructuredLSTM": (lambda: StackedStructuredLSTM(2, 4, 6, 0.5), nn.Module, {"forward", "__init__"}),
}


class _Empty:
    """A class with what Python gives every one."""

    annotated: int


_OF_PYTHON = set(vars(_Empty)) | {"__init__"}


def public(thing: object) -> set[str]:
    """Names that others may read."""
    return {name for name in dir(thing) if not name.startswith("_")}


def same(ours: object, stock: object) -> bool:
    """They are of one type, and equal where that can be asked."""
    if inspect.ismethod(ours) or inspect.isfunction(ours):
        return getattr(ours, "__func__", ours) is getattr(stock, "__func__", stock)
    if type(ours) is not type(stock):
        return False
    return ours == stock if isinstance(ours, (str, int, float, bool, type(None))) else True


@pytest.mark.parametrize("kind", PAIRS)
def test_every_public_attribute_is_that_of_the_stock_object(kind: str) -> None:
    make, make_stock, overridden = PAIRS[kind]
    ours, stock = make(), make_stock()
    assert public(stock) <= public(ours)
    differing = {
        attribute for attribute in public(stock) if not same(getattr(ours, attribute), getattr(stock, attribute))
    }
    assert differing <= overridden
    # Those of single objects, private ones included.
    differing = {key for key, value in vars(stock).items() if not same(vars(ours)[key], value)}
    assert not differing


@pytest.mark.parametrize("kind", PAIRS)
def test_a_class_of_ours_defines_nothing_of_its_base_by_accident(kind: str) -> None:
    """Private names count as well: the base calls its own helpers through the object."""
    make, make_stock, overridden = PAIRS[kind]
    ours, stock = make(), make_stock()
    own = {key for cls in type(ours).__mro__ if cls not in type(stock).__mro__ for key in vars(cls)}
    own |= set(vars(ours)) - set(vars(stock))
    clashing = own & (set(dir(type(stock))) | set(vars(stock))) - _OF_PYTHON
    assert clashing <= overridden | {"__setstate__", "__constants__", "__jit_unused_properties__"}


@pytest.mark.parametrize("mode", ["nr_rh_st", "nr_st", "random"])
def test_the_mode_is_torchs_and_ours_has_another_name(mode: str) -> None:
    made = StructuredDropoutLSTM(3, 4, mode=mode)
    changed = convert(nn.LSTM(3, 4), mode=mode)
    for lstm in (made, changed, StructuredDropoutLSTM.from_lstm(nn.LSTM(3, 4), mode=mode)):
        assert (lstm.mode, lstm.dropout_mode) == ("LSTM", mode)  # type: ignore[union-attr]
        assert f"mode={mode}" in repr(lstm)
    again = convert(changed, mode="random")
    assert (again.mode, again.dropout_mode) == ("LSTM", "random")
    stack = StackedStructuredLSTM(1, 3, 4, mode=mode)
    assert stack.dropout_mode == mode and not hasattr(stack, "mode")


def test_a_module_pickled_when_the_option_was_called_mode_still_loads() -> None:
    torch.manual_seed(0)
    for module in (StructuredDropoutLSTM(3, 4, mode="nr_st", input_dropout=0.5), StackedStructuredLSTM(1, 3, 4)):
        old = pickle.loads(pickle.dumps(module))
        # As it was written before.
        old.__dict__["mode"] = old.__dict__.pop("dropout_mode")
        loaded = pickle.loads(pickle.dumps(old))
        assert loaded.dropout_mode == module.dropout_mode
        assert vars(loaded).get("mode") == vars(module).get("mode")
        for name, parameter in module.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter)


class OnGPU(nn.Parameter):
    """Says that it lies on a GPU, as what a module looks at to choose cuDNN."""

    is_cuda = True  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Older versions of torch ask this."""
        seeming: Tensor = Tensor._make_subclass(OnGPU, Tensor.data.__get__(self))  # type: ignore[attr-defined]
        return seeming

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


@pytest.fixture
def flattened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that would lay weights out for cuDNN, on a machine that seems to have it."""
    import torch.backends.cudnn.rnn as rnn

    calls: list[tuple[Any, ...]] = []
    modes = SimpleNamespace(RNNMode=SimpleNamespace(rnn_relu=0, rnn_tanh=1, lstm=2, gru=3))
    # Not of the module, behind which torch puts another object.
    monkeypatch.setitem(rnn.get_cudnn_mode.__globals__, "_cudnn", modes)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *arguments: calls.append(arguments))
    return calls


def on_gpu(module: nn.Module) -> nn.Module:
    """Every parameter seems to lie on a GPU."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                setattr(part, name, OnGPU(parameter.detach().clone()))
    return module


def lstms() -> dict[str, nn.LSTM]:
    """One of each way in which ours come about, and torch's own."""
    stock = nn.LSTM(4, 6, 2, dropout=0.5)
    return {
        "stock": stock,
        "made": StructuredDropoutLSTM(4, 6, 2, dropout=0.5, **OPTIONS),
        "converted": convert(nn.LSTM(4, 6, 2, dropout=0.5), **OPTIONS),
        "shared": StructuredDropoutLSTM.from_lstm(stock, mode="random"),
    }


@pytest.mark.parametrize("kind", ["stock", "made", "converted", "shared"])
def test_weights_are_laid_out_for_cudnn(kind: str, flattened: list[tuple[Any, ...]]) -> None:
    """What ``.cuda()``, ``.to()``, ``.half()``, loading a module and replacing a weight do on a GPU."""
    lstm = on_gpu(lstms()[kind])
    x = torch.randn(3, 2, 4)
    lstm._apply(lambda parameter: parameter)
    # In every torch the last thing of moving a module is this.
    lstm.flatten_parameters()  # type: ignore[operator]
    assert flattened
    lstm.eval()
    with torch.no_grad():
        expected = lstm(x)[0]
        # A parameter replaced: the next forward pass lays the weights out again.
        lstm.weight_hh_l0 = OnGPU(lstm.weight_hh_l0.detach().clone())  # type: ignore[union-attr]
        torch.testing.assert_close(lstm(x)[0], expected)
        weights = {name: OnGPU(p.detach() * 2) for name, p in lstm.named_parameters()}
        assert not torch.equal(torch.func.functional_call(lstm, weights, (x,))[0], expected)
        torch.testing.assert_close(lstm(x)[0], expected)
    on_gpu(pickle.loads(pickle.dumps(lstms()[kind]))).flatten_parameters()  # type: ignore[operator]
    assert {call[3] for call in flattened} == {2}, "not laid out as an LSTM"


def test_a_state_is_loaded_module_by_module(flattened: list[tuple[Any, ...]]) -> None:
    """As OpenNMT-py does it when it resumes: parameters of each module, which then is moved to its device."""
    model = on_gpu(convert(nn.Sequential(nn.LSTM(4, 6, 2), nn.Identity()), **OPTIONS))
    state = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            parameter.data = state[f"{name}.{parameter_name}"].data
        if name:
            module.to(torch.device("cpu"))
    model[0].flatten_parameters()
    assert {call[3] for call in flattened} == {2}
    assert all(bool((p == 0.1).all()) for p in model.parameters())


def test_packed_sequences_run_as_an_lstm_in_eval_mode(flattened: list[tuple[Any, ...]]) -> None:
    lstm = lstms()["made"].eval()
    packed = pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([3, 1]))
    expected: Tensor = lstm(packed)[0].data
    on_gpu(lstm)
    torch.testing.assert_close(lstm(packed)[0].data, expected)
    assert flattened
