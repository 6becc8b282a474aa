"""`StackedStructuredLSTM`, the stack of cells that decoders run step by step."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sd_plugin import Case, StackedStructuredLSTM, StructuredDropout, StructuredLinear, _pays, stats, stepped
from sd_plugin.cell import StackedRun
from sd_plugin.patterns import draw as draw_pattern

from .. import truth
from ..tolerances import assert_close

States = tuple[Tensor, Tensor]
MODES = ["random", "nr_st", "nr_rh_st"]


@pytest.fixture(params=[0, math.inf], ids=["skipping", "dense"], autouse=True)
def pays_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Every test with products that skip whatever their size, and with torch's cells."""
    monkeypatch.setattr(_pays, "ASKED_FOR", request.param)
    return float(request.param)


def stack(*args: int, p: float = 0.0, mode: str = "nr_rh_st", sampling: str = "exact") -> StackedStructuredLSTM:
    return StackedStructuredLSTM(
        *args, dropout=p, output_dropout=p, recurrent_dropout=0.0 if mode == "nr_st" else p, mode=mode,
        sampling=sampling
    ).double()  # fmt: skip


def zeros(module: StackedStructuredLSTM, batch: int) -> States:
    shape = (module.num_layers, batch, module.hidden_size)
    return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)


def run_steps(module: StackedStructuredLSTM, x: Tensor, states: States) -> list[Tensor]:
    """A whole sequence through one training pass: outputs and final states."""
    run = module.start(x.shape[0], x.shape[1], x)
    outputs = []
    for t in range(x.shape[0]):
        y, states = run.step(t, x[t], states)
        outputs.append(y)
    return [torch.stack(outputs), *states]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((y * torch.cos(torch.arange(y.numel()).view_as(y))).sum() for y in outputs)
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def test_parameters_are_named_as_in_opennmt() -> None:
    module = StackedStructuredLSTM(2, 3, 4, dropout=0.5, recurrent_dropout=0.5)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        f"layers.{layer}.{name}": shape
        for layer, size in ((0, 3), (1, 4))
        for name, shape in (
            ("weight_ih", (16, size)), ("weight_hh", (16, 4)), ("bias_ih", (16,)), ("bias_hh", (16,)),
        )
    }  # fmt: skip
    assert isinstance(module.dropout, nn.Dropout)
    assert module.dropout.p == 0.5


@given(
    layers=st.integers(1, 3), n_in=st.integers(1, 5), hidden=st.integers(1, 5), batch=st.integers(1, 3),
    mode=st.sampled_from(MODES), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_without_dropout_training_is_the_eval_path(
    layers: int, n_in: int, hidden: int, batch: int, mode: str, seed: int
) -> None:
    """One step: this library's kernels against `nn.LSTMCell`, gradients included."""
    torch.manual_seed(seed)
    module = stack(layers, n_in, hidden, mode=mode)
    x = torch.randn(batch, n_in, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(layers, batch, hidden, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def results() -> tuple[list[Tensor], list[Tensor]]:
        y, (h, c) = module(x, (states[0], states[1]))
        return [y, h, c], gradients([y, h, c], [x, *states, *module.parameters()])

    trained = results()
    module.eval()
    assert_close(trained, results())


@given(
    mode=st.sampled_from(MODES), sampling=st.sampled_from(["exact", "bernoulli"]), layers=st.integers(1, 3),
    seed=st.integers(0, 10**6), steps=st.integers(1, 4), batch=st.integers(1, 3),
)  # fmt: skip
def test_a_run_drops_as_a_layer_over_the_sequence_would(
    mode: str, sampling: str, layers: int, seed: int, steps: int, batch: int
) -> None:
    """Against a plain loop over layers with the same patterns, drawn again in the same order."""
    n_in, hidden, p = 3, 5, 0.4
    torch.manual_seed(seed)
    module = stack(layers, n_in, hidden, p=p, mode=mode, sampling=sampling)
    x = torch.randn(steps, batch, n_in, dtype=torch.float64, requires_grad=True)
    states = zeros(module, batch)
    torch.manual_seed(seed)
    got = run_steps(module, x, states)

    torch.manual_seed(seed)

    def drawn(p: float) -> Tensor:
        case = Case.of(mode != "random", False)
        pattern = draw_pattern(case, steps, batch, hidden, p, sampling=sampling, dtype=torch.float64)
        return truth.multiplier(pattern, steps, batch, hidden, torch.float64)

    recurrent = [drawn(module.recurrent_dropout) for _ in range(layers)]
    between = [drawn(p) for _ in range(layers - 1)]
    drops = truth.Drops(torch.ones_like(x), drawn(p), between, recurrent)
    named = {f"{name.split('.')[2]}_l{name.split('.')[1]}": parameter for name, parameter in module.named_parameters()}
    expected = list(truth.lstm(x, *states, named, drops, [steps] * batch))

    leaves = [x, *module.parameters()]
    assert_close(got, expected)
    assert_close(gradients(got, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("mode", MODES)
def test_one_step_alone_is_a_run_of_one_step(mode: str) -> None:
    module = stack(2, 3, 4, p=0.5, mode=mode)
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.manual_seed(1)
    y, states = module(x, zeros(module, 2))
    torch.manual_seed(1)
    expected, expected_states = module.start(1, 2, x).step(0, x, zeros(module, 2))
    torch.testing.assert_close([y, *states], [expected, *expected_states], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["random", "nr_rh_st"])
def test_recurrent_patterns_are_new_at_each_step(mode: str) -> None:
    """Weights that copy h_{t-1} into the gate show which units its product saw."""
    torch.manual_seed(0)
    steps, batch, hidden, p = 400, 4, 10, 0.3
    module = StackedStructuredLSTM(1, 1, hidden, recurrent_dropout=p, mode=mode)
    layer = module.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        # Only the output gate sees the state; the cell is held at one.
        layer.weight_hh[3 * hidden :] = torch.eye(hidden)
        layer.bias_ih[hidden : 2 * hidden] = 100.0
    states = torch.ones(1, batch, hidden), torch.ones(1, batch, hidden)
    run = module.start(steps, batch, states[0])
    kept = []
    for t in range(steps):
        y, _ = run.step(t, torch.zeros(batch, 1), states)
        kept.append(y > math.tanh(1.0) * 0.5 + 1e-4)
    seen = torch.stack(kept)
    assert torch.equal(seen, seen[:, :1].expand_as(seen)) is (mode != "random")
    draws = steps * (batch if mode == "random" else 1)
    frequency = seen.double().mean((0, 1))
    assert bool(((frequency - (1 - p)).abs() <= 5 * math.sqrt(p * (1 - p) / draws)).all())
    agreement = (seen[1:] == seen[:-1]).double().mean().item()
    assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.05


def test_products_skip_what_each_step_dropped(pays_from: float) -> None:
    torch.manual_seed(0)
    module = stack(2, 4, 8, p=0.5)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    outputs = []
    states, run = zeros(module, 2), module.start(3, 2, x)
    for t in range(3):
        y, states = run.step(t, StructuredDropout(0.5)(x[t]), states)
        outputs.append(StructuredLinear(8, 2, dtype=torch.float64)(y))
    torch.stack(outputs).sum().backward()
    sites = stats.sites()
    assert set(sites) == {"dropout", "cell.l0.recurrent", "cell.l1.recurrent", "cell.between", "cell.output"}
    if pays_from:
        assert all((site.drawn, site.waived, site.dense) == (1, 1, 0) for site in list(sites.values())[1:])
        assert "sequences of cell steps that would not gain from skipping (8 units): 1" in stats.report()
        return
    for site in sites.values():
        assert (site.drawn, site.lost) == (3, 0)
        assert 2 * site.skipped == site.dense > 0


def test_small_steps_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the multiply-adds of one step of all layers; random dropout skips nothing, however large."""
    module, x = stack(2, 3, 4, p=0.5), torch.zeros(7, 5, 3, dtype=torch.float64)
    multiply_adds = 5 * (16 * (3 + 4) + 16 * (4 + 4))
    for least, skips in ((multiply_adds, True), (multiply_adds + 1, False)):
        monkeypatch.setattr(_pays, "ASKED_FOR", least)
        assert module.start(7, 5, x).skips is skips
    monkeypatch.setattr(_pays, "ASKED_FOR", 0)
    assert not stack(2, 3, 4, p=0.5, mode="random").start(7, 5, x).skips


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), sampling=st.sampled_from(["exact", "bernoulli"]),
    seed=st.integers(0, 10**6), wanted=st.sets(st.integers(0, 3), min_size=1),
)  # fmt: skip
def test_weights_get_the_sum_of_all_steps(sizes: list[int], sampling: str, seed: int, wanted: set[int]) -> None:
    """Steps of different batches, inputs with and without a hint, and only some parameters that want a gradient."""
    torch.manual_seed(seed)
    module = StackedStructuredLSTM(1, 6, 5, sampling=sampling).double()
    for index, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(index in wanted)
    drop = StructuredDropout(0.4, sampling=sampling)
    inputs = [torch.randn(1, n, 6, dtype=torch.float64) for n in sizes]
    inputs = [drop(x)[0] if t % 2 else x[0] for t, x in enumerate(inputs)]
    states = [(torch.randn(1, n, 5).double(), torch.randn(1, n, 5).double()) for n in sizes]

    def loss(step: Callable[[int, Tensor, States], tuple[Tensor, States]]) -> Tensor:
        results = [step(t, x, state) for t, (x, state) in enumerate(zip(inputs, states, strict=True))]
        return sum(((y * y).sum() + h.sum() + c.sin().sum() for y, (h, c) in results), torch.zeros(()))

    leaves = [parameter for parameter in module.parameters() if parameter.requires_grad]
    run = module.start(len(sizes), max(sizes), inputs[0])
    got = torch.autograd.grad(loss(run.step), leaves)
    module.eval()
    assert_close(list(got), list(torch.autograd.grad(loss(lambda t, x, state: module(x, state)), leaves)))


def test_a_backward_pass_takes_its_own_steps_only() -> None:
    """A pass for the input's gradient, kept graphs and one that fails half way leave nothing for the next."""
    torch.manual_seed(0)
    module = stack(2, 3, 4)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    outputs, *_ = run_steps(module, x, zeros(module, 2))
    parameters = list(module.parameters())
    expected = torch.autograd.grad(outputs.sum(), parameters, retain_graph=True)
    torch.autograd.grad(outputs.sum(), x, retain_graph=True)
    first_half = torch.autograd.grad(outputs[:2].sum(), parameters, retain_graph=True)

    def fail(_: Tensor) -> None:
        raise RuntimeError("half way")

    x.register_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        outputs.sum().backward(retain_graph=True)
    second_half = torch.autograd.grad(outputs[2:].sum(), parameters, retain_graph=True)
    assert_close(list(torch.autograd.grad(outputs.sum(), parameters)), list(expected))
    assert_close([a + b for a, b in zip(first_half, second_half, strict=True)], list(expected))


@pytest.mark.parametrize("first", [0, 2])
def test_steps_without_a_graph_come_before_those_with_one(first: int) -> None:
    torch.manual_seed(0)
    module = stack(2, 3, 4)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(step: Callable[[int, Tensor, States], tuple[Tensor, States]]) -> Tensor:
        states, total = zeros(module, 2), torch.zeros(())
        for t in range(4):
            with torch.set_grad_enabled(t >= first):
                y, states = step(t, x[t], states)
                total = total + y.square().sum()
        return total

    got = torch.autograd.grad(loss(module.start(4, 2, x).step), list(module.parameters()))
    module.eval()
    expected = torch.autograd.grad(loss(lambda t, x, state: module(x, state)), list(module.parameters()))
    assert_close(list(got), list(expected))


def test_steps_may_be_run_in_any_order_and_again() -> None:
    torch.manual_seed(0)
    module = stack(2, 3, 4, p=0.5)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    torch.manual_seed(1)
    run = module.start(3, 2, x)
    found = {t: run.step(t, x[t], zeros(module, 2))[0] for t in (2, 0, 1, 0)}
    torch.manual_seed(1)
    run = module.start(3, 2, x)
    for t in range(3):
        assert_close(found[t], run.step(t, x[t], zeros(module, 2))[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_steps_can_be_checkpointed_one_by_one(reentrant: bool) -> None:
    torch.manual_seed(0)
    module = stack(2, 3, 4)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(step: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        (h, c), outputs = zeros(module, 2), []
        for t in range(3):
            y, h, c = step(t, x[t], h, c)
            outputs.append(y)
        module.zero_grad()
        torch.stack(outputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]

    # A reentrant checkpoint sees the tensors that it is given by themselves.
    def flat(run: StackedRun) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def step(t: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, (h, c) = run.step(t, x, (h, c))
            return y, h, c

        return step

    once = flat(module.start(3, 2, x))
    got = gradient(lambda *arguments: checkpoint(once, *arguments, use_reentrant=reentrant))
    assert_close(got, gradient(flat(module.start(3, 2, x))))


def test_a_backward_pass_that_fails_keeps_nothing_alive() -> None:
    """torch calls nobody at the end of such a pass."""
    module = stack(2, 3, 4)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def fail(_: Tensor) -> None:
        raise RuntimeError("half way")

    def run() -> weakref.ref[Any]:
        one = module.start(4, 2, x)
        y, states = one.step(0, x[0] * 1, zeros(module, 2))
        y.register_hook(fail)
        for t in range(1, 4):
            y, states = one.step(t, y.sum() + x[t], states)
        with pytest.raises(RuntimeError, match="half way"):
            y.sum().backward()
        return weakref.ref(one)

    left = run()
    gc.collect()
    assert left() is None


def test_nothing_of_a_pass_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the input alone, over and over on one graph: what the steps left for the weights goes away."""
    monkeypatch.setattr(_pays, "ASKED_FOR", 0)
    gathered: list[Any] = []
    made = stepped._Gathered.__init__
    monkeypatch.setattr(stepped._Gathered, "__init__", lambda self: (made(self), gathered.append(self))[0])
    module = stack(1, 3, 4)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    outputs, *_ = run_steps(module, x, zeros(module, 2))
    for _ in range(2):
        torch.autograd.grad(outputs.sum(), x, retain_graph=True)
    assert len(gathered) == 1
    assert not gathered[0]._steps


def test_p_of_its_dropout_may_be_changed() -> None:
    module = stack(2, 3, 4, p=0.0)
    module.dropout.p = 0.5
    x = torch.randn(2, 3, dtype=torch.float64)
    module(x, zeros(module, 2))
    assert stats.sites()["cell.between"].drawn == 1


def test_a_hint_of_many_steps_is_not_followed() -> None:
    """Rows of a `[T, 1, K]` input viewed as one step's rows each have units of their own."""
    torch.manual_seed(0)
    module = stack(1, 6, 4)
    x = StructuredDropout(0.5)(torch.randn(5, 1, 6, dtype=torch.float64)).view(5, 6)
    y, _ = module(x, zeros(module, 5))
    assert_close(y, module.eval()(x, zeros(module, 5))[0])


def test_copies_drop_alike() -> None:
    module, x = stack(2, 3, 4, p=0.5), torch.randn(2, 3, dtype=torch.float64)

    def run(one: StackedStructuredLSTM) -> Tensor:
        torch.manual_seed(0)
        return one(x, zeros(one, 2))[0]

    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(run(other), run(module))


def test_autocast_runs_a_pass() -> None:
    torch.manual_seed(0)
    module = stack(2, 8, 8, p=0.5).float()
    x = torch.randn(3, 2, 8)
    states = (torch.zeros(2, 2, 8), torch.zeros(2, 2, 8))

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        y, h, _ = run_steps(module, x, states)
        grads = torch.autograd.grad(y.float().square().sum(), list(module.parameters()))
        return [y.float(), h.float(), *grads]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="nr_st has no recurrent dropout"):
        StackedStructuredLSTM(1, 2, 3, mode="nr_st", recurrent_dropout=0.5)
    with pytest.raises(ValueError, match="mode must be one of"):
        StackedStructuredLSTM(1, 2, 3, mode="dense")
    with pytest.raises(ValueError, match="sampling must be one of"):
        StackedStructuredLSTM(1, 2, 3, sampling="dense")
