"""`StructuredDropoutLSTM` where it drops: which units, what gradients, and that skipping changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from sd_plugin import Case, StructuredDropout, StructuredDropoutLSTM, StructuredLinear, stats
from sd_plugin.patterns import draw as draw_pattern

from .. import truth
from ..more import more
from ..tolerances import assert_close

#: mode, recurrent dropout, locked, sampling
DROPPING = [
    ("nr_rh_st", 0.4, False, "exact"),
    ("nr_rh_st", 0.4, False, "bernoulli"),
    ("nr_rh_st", 0.4, True, "exact"),
    ("nr_rh_st", 0.4, True, "bernoulli"),
    ("nr_st", 0.0, False, "exact"),
    ("nr_st", 0.0, True, "bernoulli"),
    ("random", 0.4, False, "exact"),
    ("random", 0.4, True, "exact"),
]


def make(how: tuple[str, float, bool, str] = DROPPING[0], *args: int, **kwargs: Any) -> StructuredDropoutLSTM:
    mode, recurrent, locked, sampling = how
    args = args or (4, 5, 2)
    torch.manual_seed(0)
    return StructuredDropoutLSTM(
        *args, **{"dtype": torch.float64, **kwargs}, dropout=0.4 if args[2] > 1 else 0.0, input_dropout=0.4,
        output_dropout=0.4, recurrent_dropout=recurrent, mode=mode, locked=locked, sampling=sampling,
    )  # fmt: skip


def rows(y: Tensor | PackedSequence) -> Tensor:
    return y.data if isinstance(y, PackedSequence) else y


def gradients(module: torch.nn.Module, outputs: list[Tensor], *more: Tensor) -> list[Tensor]:
    loss = sum((y * torch.cos(torch.arange(y.numel(), dtype=y.dtype).view_as(y))).sum() for y in outputs)
    return list(torch.autograd.grad(loss, [*more, *module.parameters()], retain_graph=True))


@settings(max_examples=80)
@given(
    how=st.sampled_from(DROPPING), layers=st.integers(1, 3), bidirectional=st.booleans(), bias=st.booleans(),
    form=st.sampled_from(["time-major", "batch-first", "packed", "packed unsorted", "unbatched"]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 10**6),
    n_in=st.integers(1, 5), hidden=st.integers(1, 5),
)  # fmt: skip
def test_drops_where_it_says_and_nowhere_else(
    how: tuple[str, float, bool, str], layers: int, bidirectional: bool, bias: bool, form: str,
    lengths: list[int], seed: int, n_in: int, hidden: int,
) -> None:  # fmt: skip
    """Against a plain loop with the same patterns: inside, the emitted h_t and c_t are never dropped."""
    mode, recurrent, locked, sampling = how
    batch_first, directions = form == "batch-first", 1 + bidirectional
    if form == "packed":
        lengths = sorted(lengths, reverse=True)
    elif form == "unbatched":
        lengths = lengths[:1]
    elif not form.startswith("packed"):
        lengths = [max(lengths)] * len(lengths)
    steps, batch = max(lengths), len(lengths)
    module = make(how, n_in, hidden, layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(steps, batch, n_in, dtype=torch.float64, requires_grad=True)
    h0, c0 = torch.randn(2, layers * directions, batch, hidden, dtype=torch.float64)

    torch.manual_seed(seed)
    if form.startswith("packed"):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=form == "packed")
        y, (h, c) = module(packed, (h0, c0))
        assert isinstance(y, PackedSequence)
        got, got_lengths = pad_packed_sequence(y)
        assert got_lengths.tolist() == lengths
        order = torch.arange(batch) if packed.sorted_indices is None else packed.sorted_indices
    elif form == "unbatched":
        y, (h, c) = module(x[:, 0], (h0[:, 0], c0[:, 0]))
        got, h, c, order = y.unsqueeze(1), h.unsqueeze(1), c.unsqueeze(1), torch.arange(1)
    else:
        y, (h, c) = module(x.transpose(0, 1) if batch_first else x, (h0, c0))
        got, order = y.transpose(0, 1) if batch_first else y, torch.arange(batch)

    # The same draws again, in the order of the layers: input, recurrent of each direction, output.
    torch.manual_seed(seed)
    unsorted = order.argsort()

    def drawn(size: int, p: float) -> Tensor:
        pattern = draw_pattern(
            Case.of(mode != "random", locked), steps, batch, size, p, sampling=sampling, dtype=torch.float64
        )
        return truth.multiplier(pattern, steps, batch, size, torch.float64)[:, unsorted]

    drops = truth.Drops(drawn(n_in, 0.4), torch.empty(0))
    for layer in range(layers):
        if layer:
            drops.between.append(drawn(hidden * directions, 0.4))
        drops.recurrent += [drawn(hidden, recurrent) for _ in range(directions)]
    drops.output = drawn(hidden * directions, 0.4)
    expected, h_n, c_n = truth.lstm(x, h0, c0, dict(module.named_parameters()), drops, lengths)

    outputs, wanted = [got, h, c], [expected, h_n, c_n]
    assert_close(outputs, wanted)
    assert_close(gradients(module, outputs, x), gradients(module, wanted, x))


FORMS = ["time-major", "batch-first", "unbatched", "packed"]


@pytest.mark.parametrize(
    ("how", "form"),
    [
        # Each way to drop in two forms, each form with each mode.
        *((how, form) for i, how in enumerate(DROPPING) for j, form in enumerate(FORMS) if (i + j) % 2 == 0),
        *more(*((how, form) for i, how in enumerate(DROPPING) for j, form in enumerate(FORMS) if (i + j) % 2)),
    ],
)
def test_gradcheck(how: tuple[str, float, bool, str], form: str) -> None:
    module = make(how, 3, 4, 2, bidirectional=True, batch_first=form == "batch-first")
    x = torch.randn(*((3,) if form == "unbatched" else (3, 2)), 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        given: Any = pack_padded_sequence(x, torch.tensor([3, 1])) if form == "packed" else x
        y, (h, c) = functional_call(module, dict(zip(names, parameters, strict=True)), (given,))
        return rows(y), h, c

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


def test_gradcheck_of_every_element() -> None:
    module = make(DROPPING[0], 2, 3, 1)
    names = [name for name, _ in module.named_parameters()]
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 2), (1, 2, 3), (1, 2, 3))
    ]

    def run(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y, states = functional_call(module, dict(zip(names, parameters, strict=True)), (x, (h, c)))
        return y, *states

    assert torch.autograd.gradcheck(run, (*leaves, *module.parameters()))


@given(
    case=st.sampled_from(["III", "IV"]), sampling=st.sampled_from(["exact", "bernoulli"]),
    p=st.floats(0.05, 0.95), batch_first=st.booleans(), bidirectional=st.booleans(), native=st.booleans(),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_hinted_input_is_only_faster(
    case: str, sampling: str, p: float, batch_first: bool, bidirectional: bool, native: bool, seed: int
) -> None:
    """A clone has no hint: its zeros are multiplied. Results and gradients are the same."""
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    dropout = StructuredDropout(p, case, batch_first=batch_first, sampling=sampling)
    module = StructuredDropoutLSTM(
        7, 5, batch_first=batch_first, bidirectional=bidirectional, native=native, dtype=torch.float64
    )
    dropped = dropout(x)
    stats.reset()
    y, (h, c) = module(dropped)
    skipped = stats.sites()["dropout"]
    assert skipped.used == 1
    assert skipped.dense > 0
    expected, states = module(dropped.clone())
    assert_close([y, h, c], [expected, *states])
    assert_close(gradients(module, [y, h, c], x), gradients(module, [expected, *states], x))


@given(
    shape=st.permutations([2, 3, 4]).map(tuple) | st.just((1, 3, 3)), seed=st.integers(0, 10**6),
    to=st.sampled_from(["transpose", "merge", "split", "unsqueeze"]), batch_first=st.booleans(),
)  # fmt: skip
def test_a_hint_of_other_time_steps_is_not_followed(
    shape: tuple[int, int, int], seed: int, to: str, batch_first: bool
) -> None:
    """A view may keep rows in place and yet give them to other time steps."""
    torch.manual_seed(seed)
    dropped = StructuredDropout(0.5)(torch.randn(shape, dtype=torch.float64))
    steps, batch, size = shape
    x = {
        "transpose": dropped.transpose(0, 1),
        "merge": dropped.view(1, steps * batch, size),
        "split": dropped.view(steps * batch, 1, size),
        "unsqueeze": dropped.view(steps * batch, size),
    }[to]
    module = StructuredDropoutLSTM(size, 3, native=False, batch_first=batch_first, dtype=torch.float64)
    assert_close(module(x)[0], module(x.clone())[0])


def test_dropped_output_lets_the_next_product_skip() -> None:
    torch.manual_seed(0)
    lstm = StructuredDropoutLSTM(4, 8, output_dropout=0.5, site="enc")
    projection = StructuredLinear(8, 3)
    y, _ = lstm(torch.randn(5, 2, 4))
    projection(y).sum().backward()
    site = stats.sites()["enc.output"]
    assert (site.drawn, site.used) == (1, 1)
    assert site.skipped * 2 == site.dense


def test_unbatched_dropped_output_lets_the_next_product_skip() -> None:
    torch.manual_seed(0)
    lstm = StructuredDropoutLSTM(4, 8, output_dropout=0.5, dtype=torch.float64)
    projection = StructuredLinear(8, 3, dtype=torch.float64)
    y, _ = lstm(torch.randn(5, 4, dtype=torch.float64))
    assert_close(projection(y), projection(y.clone()))
    assert stats.sites()["lstm.output"].used == 1


def test_final_states_are_not_dropped_with_the_output() -> None:
    torch.manual_seed(0)
    y, (h, c) = StructuredDropoutLSTM(4, 8, output_dropout=0.5, recurrent_dropout=0.5)(torch.randn(5, 2, 4))
    assert bool((h != 0).all())
    assert bool((c != 0).all())
    kept = y[-1] != 0
    assert kept.sum() == 2 * 4
    assert_close(y[-1][kept], 2 * h[0][kept])


@pytest.mark.parametrize("how", DROPPING)
def test_the_seed_decides(how: tuple[str, float, bool, str]) -> None:
    module, x = make(how), torch.randn(4, 3, 4, dtype=torch.float64)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("how", DROPPING)
def test_a_graph_kept_gives_its_gradient_again(how: tuple[str, float, bool, str]) -> None:
    module, x = make(how), torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = module(x)[0].square().sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (x, *module.parameters())]
    loss.backward()
    for leaf, grad in zip((x, *module.parameters()), once, strict=True):
        assert_close(leaf.grad, 2 * grad)
        assert bool((grad != 0).any())


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    # Of a sum, torch alone would take the first derivative for a constant and go on.
    for loss in (make()(x)[0].square().sum(), make()(x)[0].sum()):
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("how", DROPPING)
def test_no_grad_training_mode_drops_the_same(how: tuple[str, float, bool, str]) -> None:
    module, x = make(how), torch.randn(4, 3, 4, dtype=torch.float64)
    torch.manual_seed(1)
    expected = module(x)[0]
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        with context():
            y = module(x)[0]
        assert not y.requires_grad
        # Not bit for bit: in inference mode no hint can be trusted, and sums run over the zeros as well.
        assert_close(y, expected.detach())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", DROPPING)
def test_checkpointing_recomputes_the_same_dropout(how: tuple[str, float, bool, str], reentrant: bool) -> None:
    module, x = make(how), torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        y = call(lambda x: module(x)[0], x)
        leaves = [x, *module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in leaves)]

    def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=reentrant)

    torch.testing.assert_close(run(checkpointed), run(lambda f, x: f(x)), rtol=0, atol=0)


@pytest.mark.parametrize("how", DROPPING)
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_is_close_to_float32(how: tuple[str, float, bool, str], packed: bool) -> None:
    module = make(how, 16, 16, 2, dtype=torch.float32)
    x = torch.randn(6, 4, 16, requires_grad=True)
    head = StructuredLinear(16, 3)

    def run(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(1)
        y, (h, _) = module(pack_padded_sequence(x, torch.tensor([6, 5, 2, 1])) if packed else x)
        z = head(rows(y))
        assert h.dtype == z.dtype == dtype
        return [z.float(), *torch.autograd.grad(z.float().square().sum(), [x, *module.parameters()])]

    expected = run(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(torch.bfloat16)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.03 * other.norm()
        assert not torch.equal(one, other), "autocast did nothing"


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_accumulates_as_a_low_precision_module(backward_inside: bool) -> None:
    """The kernels' sums stay in float32: the result is bit for bit that of a module in autocast's dtype."""
    torch.manual_seed(0)
    module = StructuredDropoutLSTM(40, 24, recurrent_dropout=0.5)
    low = copy.deepcopy(module).bfloat16()
    x = torch.randn(6, 4, 40).bfloat16()

    def run(module: StructuredDropoutLSTM, x: Tensor, enabled: bool) -> list[Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = module(x)
            if backward_inside:
                y.float().square().sum().backward()
        if not backward_inside:
            y.float().square().sum().backward()
        return [y, *(parameter.grad.bfloat16() for parameter in module.parameters())]

    with torch.no_grad():
        for parameter, lowered in zip(module.parameters(), low.parameters(), strict=True):
            parameter.copy_(lowered)
    torch.testing.assert_close(run(module, x.float(), True), run(low, x, False), rtol=0, atol=0)


def test_autocast_leaves_float64_alone() -> None:
    module, x = make(), torch.randn(4, 3, 4, dtype=torch.float64)
    torch.manual_seed(1)
    expected = module(x)[0]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x)[0], expected)


def test_reparametrised_weights_are_seen() -> None:
    """A hook that sets `weight_hh_l0` before each call, as AWD-LSTM's weight dropout does."""
    module = make(DROPPING[0], 4, 5, 1)
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.register_parameter("weight_hh_l0_raw", torch.nn.Parameter(raw.detach()))
    module.weight_hh_l0 = module.weight_hh_l0_raw * 0
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    torch.manual_seed(1)
    y = module(x)[0]
    other = make(DROPPING[0], 4, 5, 1)
    torch.nn.init.zeros_(other.weight_hh_l0)
    torch.manual_seed(1)
    assert torch.equal(y, other(x)[0])
    y.sum().backward()
    assert module.weight_hh_l0_raw.grad is not None
