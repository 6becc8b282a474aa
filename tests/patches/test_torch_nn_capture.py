"""What torch records of a call, to run something else in its place, is what it records without the patch."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import sd_plugin
from sd_plugin import hints, stats

pytestmark = pytest.mark.usefixtures("unpatched")

T, B, K, WORDS = 5, 3, 16, 11
VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
#: Before torch 2.5 the debugging backend "eager" calls a model's own modules, in a graph that looks like a program.
calls_modules = pytest.mark.skipif(VERSION < (2, 5), reason="a graph calls modules there")
eager = pytest.param("eager", marks=calls_modules)
#: torch's own function; as a global it would be replaced.
STOCK = [torch.addmm]


class LanguageModel(nn.Module):
    """All that the patch replaces, dropouts on."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.embedding, self.drop, self.packed = nn.Embedding(WORDS, K), nn.Dropout(0.5), packed
        self.lstm, self.out = nn.LSTM(K, K, 2, dropout=0.5), nn.Linear(K, K)
        self.bias, self.weight = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(K, 4))

    def forward(self, text: Tensor) -> Tensor:
        x = self.drop(self.embedding(text))
        if self.packed:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, T - 1, T - 3]))
            packed, _ = self.lstm(PackedSequence(self.drop(packed.data), packed.batch_sizes))
            y, _ = pad_packed_sequence(packed)
        else:
            y, _ = self.lstm(x)
        y = self.drop(self.out(self.drop(y)))
        return torch.addmm(self.bias, y.view(-1, K), self.weight)


def alike(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(alike(a, b) for a, b in zip(found, expected, strict=True))
    return bool(found == expected)


def outcomes(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What comes of ``call`` without and with the patch, from the same seed: its result, or the error's type."""
    found = []
    for patched in (False, True):
        torch._dynamo.reset()
        if patched:
            sd_plugin.enable("torch_nn")
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(call())
            except Exception as error:
                found.append(type(error))
    return found[0], found[1]


def trained(function: Callable[..., Tensor], parameters: list[nn.Parameter], *arguments: Tensor) -> list[Tensor]:
    """Result and gradients of two calls: the second runs what the first has compiled."""
    found = []
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        y = function(*arguments)
        y.square().sum().backward()
        found += [y.detach(), *(p.grad for p in parameters if p.grad is not None)]
    return found


def text() -> Tensor:
    return torch.randint(WORDS, (T, B), generator=torch.Generator().manual_seed(1))


def activation() -> Tensor:
    return torch.randn(T, B, K, generator=torch.Generator().manual_seed(2))


def assert_alike(call: Callable[[], Any], *, works: bool = True) -> None:
    expected, found = outcomes(call)
    assert not works or not isinstance(expected, type), f"torch itself raises {expected}"
    assert alike(found, expected)
    assert not stats.sites(), "no unit was dropped by this library"


@pytest.mark.parametrize(
    ("packed", "backend"), [(True, "aot_eager"), pytest.param(False, "eager", marks=calls_modules)]
)
def test_compiled_training_is_torchs_own(packed: bool, backend: str) -> None:
    model = LanguageModel(packed)
    assert_alike(lambda: trained(torch.compile(model, backend=backend), list(model.parameters()), text()))


def test_a_function_that_calls_an_lstm_compiles_as_in_torch() -> None:
    lstm = nn.LSTM(K, K, 2, dropout=0.5)
    compiled = lambda: torch.compile(lambda x: lstm(x)[0], backend="aot_eager")  # noqa: E731
    assert_alike(lambda: trained(compiled(), list(lstm.parameters()), activation()))


def test_the_compiler_reads_no_more_of_the_patch_than_the_replacements() -> None:
    """It takes to each function that a compiled one calls, and warns of what it cannot read in there."""
    lstm, drop, linear = nn.LSTM(K, K, 2, dropout=0.5), nn.Dropout(0.5), nn.Linear(K, K)
    sd_plugin.enable("torch_nn")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: linear(drop(lstm(drop(x))[0])), backend="aot_eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled(activation())
    # The function itself, and four calls of what was replaced, each of which it may begin anew once.
    assert torch._dynamo.utils.counters["frames"]["total"] <= 2 * 5
    assert not [str(warning.message) for warning in told if "sd_plugin" in str(warning.message)]


@pytest.mark.parametrize("backend", [eager, "aot_eager"])
def test_what_torch_compiles_in_one_graph_is_one_graph(backend: str) -> None:
    model = LanguageModel()
    block = nn.Sequential(nn.Dropout(0.5), nn.Linear(K, K), nn.Dropout(0.5))

    def function(x: Tensor) -> Tensor:
        return torch.addmm(model.bias, block(x).view(-1, K), model.weight)

    whole = [model.bias, model.weight, *block.parameters()]
    assert_alike(lambda: trained(torch.compile(function, backend=backend, fullgraph=True), whole, activation()))


def test_addmm_compiles_when_the_patch_is_gone_again() -> None:
    sd_plugin.enable("torch_nn")
    x, weight, bias = torch.randn(4, K), torch.randn(K, 3), torch.randn(3)
    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: torch.addmm(bias, x, weight), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), torch.addmm(bias, x, weight))
        sd_plugin.disable("torch_nn")


@calls_modules
def test_what_is_not_compiled_any_more_is_torchs_own_too() -> None:
    """Beyond its limit of shapes, ``torch.compile`` runs a function as it is written."""
    model = LanguageModel()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

    def call() -> list[Tensor]:
        with torch._dynamo.config.patch({limit: 1}):
            compiled = torch.compile(model, backend="eager")
            return [compiled(torch.ones(T, batch, dtype=torch.long)).detach() for batch in (2, 3, 4)]

    assert_alike(call)


def test_what_follows_a_compiled_function_is_structured() -> None:
    sd_plugin.enable("torch_nn")
    model, double = LanguageModel(), torch.compile(lambda x: x * 2, backend="eager")
    double(model(text())).sum().backward()
    assert stats.sites()


@pytest.mark.parametrize("what", ["jit.trace", "export", "export strict", "make_fx", "fake", "flops"])
def test_other_recorders_see_torchs_own(what: str) -> None:
    model, block = LanguageModel(), nn.Sequential(nn.Dropout(0.5), nn.Linear(K, 4))

    def call() -> Any:
        if what == "jit.trace":
            return torch.jit.trace(model, text(), check_trace=False)(text())
        if what.startswith("export"):
            program = torch.export.export(block, (activation(),), strict="strict" in what)
            return str(program.graph), program.module()(activation())
        if what == "make_fx":
            return str(make_fx(block)(activation()).graph)
        if what == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                return str(model(text()).shape)
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counted:
            model(text()).sum().backward()
        return counted.get_total_flops()

    # Strict export is new since torch 2.3, and not on every Python.
    assert_alike(call, works=not what.startswith("export"))


def test_fx_sees_torchs_functions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.out = nn.Dropout(0.0), nn.Linear(K, K)

        def forward(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            return torch.addmm(bias, self.out(self.drop(x)), weight)

    model = Model()

    def call() -> Any:
        traced = torch.fx.symbolic_trace(model)
        (product,) = (node for node in traced.graph.nodes if node.op == "call_function")
        return str(traced.graph), product.target is STOCK[0]

    assert_alike(call)


@pytest.mark.parametrize("transform", ["vmap", "ensemble", "grad", "jvp"])
def test_under_torch_func_all_is_torchs_own(transform: str) -> None:
    block, lstm = nn.Sequential(nn.Dropout(0.5), nn.Linear(K, 4)), nn.LSTM(K, K, 2, dropout=0.5)
    layers = [nn.Linear(K, 4) for _ in range(3)]
    functional_call = torch.func.functional_call
    hinted = activation()

    def call() -> Any:
        if transform == "vmap":
            return torch.vmap(block, randomness="different")(torch.stack([activation()] * 2)).detach()
        if transform == "ensemble":
            parameters, buffers = torch.func.stack_module_state(layers)
            base = copy.deepcopy(layers[0]).to("meta")
            return torch.vmap(lambda p, b: functional_call(base, (p, b), (hinted,)))(parameters, buffers).detach()
        if transform == "jvp":
            return torch.func.jvp(block, (activation(),), (torch.ones(T, B, K),))
        own = {name: parameter.detach() for name, parameter in lstm.named_parameters()}
        found = torch.func.grad(lambda p: functional_call(lstm, p, (activation(),))[0].square().sum())(own)
        return list(found.values())

    assert_alike(call)


def test_models_of_an_ensemble_take_a_tensor_that_was_dropped() -> None:
    """A hint on what ``vmap`` does not map, and weights that it does."""
    sd_plugin.enable("torch_nn")
    lstm, layers = nn.LSTM(K, K), [nn.Linear(K, 4) for _ in range(3)]
    dropped = nn.Dropout(0.5)(activation())
    assert hints.lookup(dropped) is not None
    parameters, _ = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    found = torch.vmap(lambda p: torch.func.functional_call(base, p, (dropped,)))(parameters)
    torch.testing.assert_close(found, torch.stack([layer(dropped) for layer in layers]))
    del lstm


def test_a_call_with_other_parameters_is_structured_with_those() -> None:
    sd_plugin.enable("torch_nn", mode="nr_st")
    lstm = nn.LSTM(K, 8)
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in lstm.named_parameters()}
    dropped = nn.Dropout(0.5)(activation())
    found, _ = torch.func.functional_call(lstm, other, (dropped,))
    gradients = torch.autograd.grad(found.square().sum(), list(other.values()))
    assert stats.sites()["dropout 16"].used == 1
    sd_plugin.disable("torch_nn")
    expected, _ = torch.func.functional_call(lstm, other, (dropped.clone(),))
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(other.values()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


SCRIPTED = """
import torch
from torch import addmm
from torch.nn.utils.rnn import pack_padded_sequence

def product(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return addmm(bias, x, weight)

def packed(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return pack_padded_sequence(x, lengths, True, True)[0]
"""


@pytest.mark.parametrize("imported", ["before the patch", "after it"])
def test_functions_with_imported_names_are_scripted(imported: str, tmp_path: Path) -> None:
    (tmp_path / "scripted.py").write_text(SCRIPTED)

    def load() -> ModuleType:
        spec = importlib.util.spec_from_file_location("scripted", tmp_path / "scripted.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["scripted"] = module
        spec.loader.exec_module(module)
        return module

    try:
        module = load()
        sd_plugin.enable("torch_nn")
        module = module if imported.startswith("before") else load()
        x, weight, bias = torch.randn(4, 3), torch.randn(3, 2), torch.randn(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(torch.jit.script(module.product)(bias, x, weight), torch.addmm(bias, x, weight))
            scripted = torch.jit.script(module.packed)
        padded, lengths = torch.randn(2, 3, 4), torch.tensor([3, 2])
        expected = nn.utils.rnn.pack_padded_sequence(padded, lengths, True).data
        assert torch.equal(scripted(padded, lengths), expected)
    finally:
        sys.modules.pop("scripted", None)
