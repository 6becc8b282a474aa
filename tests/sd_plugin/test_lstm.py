"""`StructuredDropoutLSTM` is `nn.LSTM` where nothing is dropped: results, gradients, errors, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from sd_plugin import StructuredDropoutLSTM

from ..tolerances import SMALL_DEPTH, assert_close

Sequences = Tensor | PackedSequence
States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """Options of an LSTM and one input for it."""

    options: dict[str, Any]
    form: str
    lengths: tuple[int, ...]
    with_state: bool
    seed: int

    def stock(self, **more: Any) -> nn.LSTM:
        torch.manual_seed(self.seed)
        return nn.LSTM(**self.options, **more, dtype=torch.float64)

    def inputs(self) -> tuple[Tensor, States | None]:
        """A padded or unbatched leaf, and initial states."""
        steps, batch = max(self.lengths), len(self.lengths)
        directions = 1 + self.options["bidirectional"]
        layers, hidden = self.options["num_layers"] * directions, self.options["hidden_size"]
        shape: tuple[int, ...] = (batch, steps) if self.options["batch_first"] else (steps, batch)
        states: tuple[int, ...] = (layers, batch, hidden)
        if self.form == "unbatched":
            shape, states = (steps,), (layers, hidden)
        x = torch.randn(*shape, self.options["input_size"], dtype=torch.float64, requires_grad=True)
        if not self.with_state:
            return x, None
        h, c = (torch.randn(states, dtype=torch.float64, requires_grad=True) for _ in range(2))
        return x, (h, c)

    def laid_out(self, x: Tensor) -> Sequences:
        """``x`` packed, if this call is of packed sequences."""
        if not self.form.startswith("packed"):
            return x
        lengths = torch.tensor(self.lengths)
        return pack_padded_sequence(x, lengths, self.options["batch_first"], self.form == "packed sorted")


@st.composite
def calls(draw: st.DrawFn, max_layers: int = 3) -> Call:
    """Every option of ``nn.LSTM`` that its structured kin has, and every form of input."""
    options = {
        "input_size": draw(st.integers(1, 5)),
        "hidden_size": draw(st.integers(1, 5)),
        "num_layers": draw(st.integers(1, max_layers)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    form = draw(st.sampled_from(["batched", "unbatched", "packed sorted", "packed unsorted"]))
    if form.startswith("packed"):
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        if form == "packed sorted":
            lengths.sort(reverse=True)
    else:
        lengths = [draw(st.integers(1, 5))] * (1 if form == "unbatched" else draw(st.integers(1, 4)))
    return Call(options, form, tuple(lengths), draw(st.booleans()), draw(st.integers(0, 10**6)))


def results(
    module: nn.Module, call: Call, x: Tensor, states: States | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Output and final states, and gradients of a function of all three for inputs and parameters."""
    y, (h, c) = module(call.laid_out(x), states)
    assert isinstance(y, PackedSequence) == call.form.startswith("packed")
    outputs = [y.data if isinstance(y, PackedSequence) else y, h, c]
    loss = sum((output * torch.sin(torch.arange(output.numel()).view_as(output))).sum() for output in outputs)
    leaves = [x, *(states or ()), *module.parameters()]
    return outputs, list(torch.autograd.grad(loss, leaves, allow_unused=True))


def assert_equal(got: list[Any], expected: list[Any]) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@settings(max_examples=100)
@given(call=calls())
def test_equals_nn_lstm_without_dropout(call: Call) -> None:
    stock = call.stock()
    ours = StructuredDropoutLSTM(**call.options, native=False, dtype=torch.float64)
    ours.load_state_dict(stock.state_dict())
    x, states = call.inputs()
    for expected, got in zip(results(stock, call, x, states), results(ours, call, x, states), strict=True):
        assert_close(got, expected)
    ours.eval()
    assert_close(results(ours, call, x, states)[0], results(stock, call, x, states)[0])


@given(call=calls(max_layers=2), p=st.sampled_from([0.0, 0.3]))
def test_eval_mode_is_nn_lstm_bit_for_bit(call: Call, p: float) -> None:
    stock = call.stock().eval()
    ours = StructuredDropoutLSTM.from_lstm(stock, recurrent_dropout=p, input_dropout=p, output_dropout=p)
    assert not ours.training
    x, states = call.inputs()
    for expected, got in zip(results(stock, call, x, states), results(ours, call, x, states), strict=True):
        assert_equal(got, expected)


@given(call=calls())
def test_random_mode_is_the_dropout_of_nn_lstm_bit_for_bit(call: Call) -> None:
    stock = call.stock(dropout=0.4 if call.options["num_layers"] > 1 else 0.0)
    ours = StructuredDropoutLSTM.from_lstm(stock, mode="random")
    x, states = call.inputs()
    torch.manual_seed(7)
    expected = results(stock, call, x, states)
    torch.manual_seed(7)
    for one, other in zip(expected, results(ours, call, x, states), strict=True):
        assert_equal(other, one)


@given(call=calls())
def test_checkpoints_go_both_ways(call: Call) -> None:
    stock = call.stock()
    ours = StructuredDropoutLSTM(**call.options, dtype=torch.float64, recurrent_dropout=0.5, input_dropout=0.5)
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x, states = call.inputs()
    expected, _ = results(stock, call, x, states)
    assert_equal(results(ours.eval(), call, x, states)[0], expected)
    again = StructuredDropoutLSTM(**call.options, dtype=torch.float64)
    again.load_state_dict(stock.state_dict())
    assert_equal(list(again.parameters()), list(ours.parameters()))


def state(*shape: int) -> States:
    return torch.zeros(shape), torch.zeros(shape)


PACKED = pack_padded_sequence(torch.zeros(3, 2, 4), torch.tensor([3, 2]))
WRONG = {
    "columns": (torch.zeros(3, 2, 5), None),
    "columns, unbatched": (torch.zeros(3, 5), None),
    "columns, packed": (PACKED._replace(data=torch.zeros(5, 5)), None),
    "dimensions": (torch.zeros(4), None),
    "more dimensions": (torch.zeros(1, 3, 2, 4), None),
    "dtype": (torch.zeros(3, 2, 4).double(), None),
    "dtype, half": (torch.zeros(3, 2, 4).bfloat16(), None),
    "state rows": (torch.zeros(3, 2, 4), state(2, 3, 6)),
    "state columns": (torch.zeros(3, 2, 4), state(2, 2, 5)),
    "state layers": (torch.zeros(3, 2, 4), state(1, 2, 6)),
    "state of the cell": (torch.zeros(3, 2, 4), (torch.zeros(2, 2, 6), torch.zeros(2, 2, 5))),
    "state unbatched": (torch.zeros(3, 2, 4), state(2, 6)),
    "state batched": (torch.zeros(3, 4), state(2, 1, 6)),
    "state, packed": (PACKED, state(2, 3, 6)),
}


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"),
    reason="nn.LSTM of this torch leaves some of these checks to its kernels",
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors_are_those_of_nn_lstm(wrong: tuple[Sequences, Any], training: bool) -> None:
    x, states = wrong
    stock = nn.LSTM(4, 6, 2)
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever nn.LSTM raises is the specification
        stock(x, states)
    assert isinstance(theirs.value, (ValueError, RuntimeError))
    for options in ({"recurrent_dropout": 0.5}, {"native": False}):
        ours = StructuredDropoutLSTM(4, 6, 2, **options).train(training)
        with pytest.raises(theirs.type):
            ours(x, states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_packed_input_of_another_dtype(dtype: torch.dtype) -> None:
    # nn.LSTM leaves this to its kernels, whose words depend on the machine.
    with pytest.raises(ValueError, match="does not match weight dtype"):
        StructuredDropoutLSTM(4, 6, native=False)(PACKED._replace(data=PACKED.data.to(dtype)))


def test_options_out_of_range_are_named() -> None:
    for make in (lambda: StructuredDropoutLSTM(4, 6, proj_size=2), lambda: StructuredDropoutLSTM.from_lstm(
        nn.LSTM(4, 6, proj_size=2)
    )):  # fmt: skip
        with pytest.raises(NotImplementedError, match="proj_size"):
            make()
    with pytest.raises(NotImplementedError, match="proj_size"):
        StructuredDropoutLSTM(4, 6, 1, True, False, 0.0, False, 2)
    with pytest.raises(ValueError, match="nr_st has no recurrent dropout"):
        StructuredDropoutLSTM(4, 6, mode="nr_st", recurrent_dropout=0.1)
    with pytest.raises(ValueError, match="mode must be one of random, nr_st, nr_rh_st, got 'structured'"):
        StructuredDropoutLSTM(4, 6, mode="structured")
    with pytest.raises(ValueError, match="sampling must be one of exact, bernoulli"):
        StructuredDropoutLSTM(4, 6, sampling="poisson")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        StructuredDropoutLSTM(4, 6, 2, dropout=1.0)
    with pytest.raises(TypeError, match="recurent_dropout"):
        StructuredDropoutLSTM(4, 6, recurent_dropout=0.1)


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_drop_alike_and_share_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    ours = StructuredDropoutLSTM(4, 6, 2, dropout=0.5, recurrent_dropout=0.5, locked=True, sampling="bernoulli")
    other = copied(ours)
    assert repr(other) == repr(ours)
    x = torch.randn(3, 2, 4)

    def run(module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return module(x)[0]

    expected = run(ours)
    assert torch.equal(run(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(run(ours), expected)
    assert not run(other).any()
    assert not other.eval()(x)[0].any(), "its own weights in eval mode, too"


def test_from_lstm_leaves_the_given_module_as_it_is() -> None:
    stock = nn.LSTM(4, 6)
    ours = StructuredDropoutLSTM.from_lstm(stock, recurrent_dropout=0.5)
    assert all(a is b for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    x = torch.randn(3, 2, 4)
    expected = stock(x)[0]
    ours.weight_ih_l0 = nn.Parameter(torch.zeros_like(stock.weight_ih_l0))
    ours.register_forward_hook(lambda *_: None)
    ours.eval()
    assert torch.equal(stock(x)[0], expected)
    assert stock.training
    assert not stock._forward_hooks


def test_a_module_to_another_dtype() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8)
    single = StructuredDropoutLSTM(8, 16, 2, dropout=0.5, recurrent_dropout=0.5, input_dropout=0.5)
    reference = copy.deepcopy(single)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        coarser = torch.float32 if dtype == torch.float64 else dtype
        module = copy.deepcopy(single).to(dtype)
        torch.manual_seed(1)
        y, (h, c) = module(x.to(dtype))
        torch.manual_seed(1)
        expected, _ = reference(x)
        assert y.dtype == h.dtype == c.dtype == dtype
        # What is compared with is in float32, and so exact beside a half type.
        assert_close(y.to(coarser), expected, exact=True)
        y.float().square().sum().backward()
        reference.zero_grad()
        expected.square().sum().backward()
        for (name, got), wanted in zip(module.named_parameters(), reference.parameters(), strict=True):
            assert got.grad is not None
            assert got.grad.dtype == dtype, name
            # Gradients are taken of outputs that were rounded, and sum over 12 rows.
            assert_close(got.grad.to(coarser), wanted.grad, depth=2 * SMALL_DEPTH, exact=True, name=name)


def test_no_rows_is_no_error() -> None:
    for options in ({}, {"native": False}, {"recurrent_dropout": 0.5, "output_dropout": 0.5}):
        y, (h, c) = StructuredDropoutLSTM(4, 6, **options)(torch.zeros(3, 0, 4))
        assert y.shape == (3, 0, 6)
        assert h.shape == c.shape == (1, 0, 6)


def test_its_repr_tells_what_it_drops() -> None:
    text = repr(StructuredDropoutLSTM(4, 6, 2, dropout=0.5, recurrent_dropout=0.25))
    for told in ("4, 6", "num_layers=2", "dropout=0.5", "recurrent_dropout=0.25", "mode=nr_rh_st"):
        assert told in text
    assert "output_dropout" not in text
