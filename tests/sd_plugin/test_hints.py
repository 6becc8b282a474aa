"""Hints: found again where the rows are in place, not trusted elsewhere, and never of any consequence."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from sd_plugin import StructuredDropout, StructuredDropoutLSTM, StructuredLinear, hints, stats
from sd_plugin.kernels import TIME_MAJOR, Kept, Steps

from ..tolerances import assert_close

SEEDS = st.integers(0, 10**6)
#: What a program may do to a tensor on its way to the next product, in place or not.
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "view": lambda x: x.view_as(x),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(0) if x.dim() > 1 else x,
    "flatten rows": lambda x: x.flatten(0, -2) if x.dim() > 1 else x,
    "a step per row": lambda x: x.reshape(-1, 1, x.shape[-1]),
    "one step": lambda x: x.reshape(1, -1, x.shape[-1]),
    "other columns": lambda x: x.reshape(-1, x.numel() // 2) if x.numel() % 2 == 0 and x.numel() else x,
    "contiguous": lambda x: x.contiguous(),
    "whole slice": lambda x: x[..., 0 : x.shape[-2], :] if x.dim() > 1 else x,
    "from the second": lambda x: x[1:],
    "all but a column": lambda x: x[..., 1:],
    "every other": lambda x: x[::2],
    "transpose rows": lambda x: x.transpose(0, -2) if x.dim() > 1 else x,
    "transpose columns": lambda x: x.transpose(-1, -2) if x.dim() > 1 else x,
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "flip": lambda x: x.flip(0),
    "expand": lambda x: x.unsqueeze(0).expand(2, *x.shape),
    "as strided": lambda x: x.as_strided(x.shape, x.stride(), 0),
    "plus": lambda x: x + 1,
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(0.5),
    "put": lambda x: x.index_fill_(-1, torch.tensor([0]), 3.0) if x.shape[-1] else x,
    "assign": lambda x: x.__setitem__(0, 2.0) or x if x.shape[0] else x,
    "out": lambda x: torch.add(torch.ones_like(x), 1, out=x) if x.is_contiguous() else x,
    "transpose_": lambda x: x.transpose_(0, 1) if x.dim() > 1 else x,
    "unsqueeze_": lambda x: x.unsqueeze_(0),
}
#: Those after which rows are where they were, so that the hint must not be lost.
KEEPING = ["as it is", "view", "unsqueeze", "flatten rows", "contiguous", "whole slice"]


def dropped(shape: tuple[int, ...], batch_first: bool = False, sampling: str = "exact", p: float = 0.5) -> Tensor:
    """A tensor of no zeros, dropped."""
    x = torch.rand(shape, dtype=torch.float64) + 1
    return StructuredDropout(p, batch_first=batch_first, sampling=sampling)(x)


def is_trusted(tensor: Tensor) -> bool:
    """There is a hint to trust. Then the columns it does not name are zero, which is asserted."""
    hint = hints.lookup(tensor)
    if hint is None:
        return False
    rows = tensor.view(hint.shape)
    for t, row in enumerate(hint.steps.split(rows)):
        assert not row[:, ~hint.kept.mask()[t]].any()
    return True


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)) | st.tuples(
    st.integers(1, 3), st.integers(1, 4)
)


@settings(max_examples=300)
@given(
    shape=SHAPES, names=st.lists(st.sampled_from(list(OPERATIONS)), min_size=1, max_size=4),
    batch_first=st.booleans(), sampling=st.sampled_from(["exact", "bernoulli"]), seed=SEEDS,
)  # fmt: skip
def test_whatever_is_done_a_trusted_hint_is_true_and_a_product_the_same(
    shape: tuple[int, ...], names: list[str], batch_first: bool, sampling: str, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = [dropped(shape, batch_first, sampling)]
    assert is_trusted(tensors[0])
    for name in names:
        try:
            tensors.append(OPERATIONS[name](tensors[-1]))
        except RuntimeError:
            # torch refuses some in-place operations on expanded memory, and that is all right.
            continue
    for tensor in tensors:
        is_trusted(tensor)
        if tensor.shape[-1] == 0:
            continue
        layer = StructuredLinear(tensor.shape[-1], 3, dtype=torch.float64)
        assert_close(layer(tensor), linear(tensor, layer.weight, layer.bias))
        if tensor.dim() in (2, 3) and tensor.numel():
            lstm = StructuredDropoutLSTM(
                tensor.shape[-1], 2, native=False, batch_first=batch_first, dtype=torch.float64
            )
            assert_close(lstm(tensor)[0], lstm(tensor.clone())[0])


@given(shape=SHAPES, names=st.lists(st.sampled_from(KEEPING), max_size=3), batch_first=st.booleans(), seed=SEEDS)
def test_a_hint_survives_what_leaves_the_rows_in_place(
    shape: tuple[int, ...], names: list[str], batch_first: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = dropped(shape, batch_first)
    for name in names:
        x = OPERATIONS[name](x)
    assert hints.lookup(x) is not None
    StructuredLinear(x.shape[-1], 2, dtype=torch.float64)(x)
    assert stats.sites()["dropout"].lost == 0


@pytest.mark.parametrize(
    "name",
    [
        "clone",
        "plus",
        "from the second",
        "all but a column",
        "transpose rows",
        "flip",
        "expand",
        "add_",
        "mul_",
        "put",
        "assign",
        "out",
    ],
)
def test_a_hint_is_lost_where_it_may_not_hold(name: str) -> None:
    torch.manual_seed(0)
    x = dropped((3, 4, 6))
    view = x.view(12, 6)
    assert hints.lookup(view) is not None
    y = OPERATIONS[name](x)
    assert hints.lookup(y) is None
    if name.endswith("_") or name in ("put", "assign", "out"):
        assert hints.lookup(view) is None, "nor through another view of the same memory"
    layer = StructuredLinear(y.shape[-1], 2, dtype=torch.float64)
    assert torch.equal(layer(y), linear(y, layer.weight, layer.bias))
    assert stats.sites()["dropout"].lost == 1


def test_the_middle_of_a_view_may_be_dropped() -> None:
    """A view of a view finds the tensor that both stem from."""
    x = dropped((3, 4, 6))
    assert hints.lookup(x.view(12, 6).view(2, 6, 6)[0:2]) is hints.lookup(x)


def test_a_tensor_given_memory_of_another_shape_has_no_hint() -> None:
    x = dropped((3, 4, 6))
    x.data = torch.ones(2, 6, dtype=torch.float64)
    assert hints.lookup(x) is None


def test_a_saved_tensor_holds_nothing_of_the_library() -> None:
    x = dropped((3, 4, 6))
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        assert not any(b"sd_plugin" in archive.read(name) for name in archive.namelist())
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["x"]
    for other in (loaded, copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(other, x)
        assert hints.lookup(other) is None
    assert hints.lookup(x) is not None


@given(steps=st.integers(1, 4), batch=st.integers(1, 3), time_dim=st.sampled_from([0, 1]), seed=SEEDS)
def test_unbound_steps_carry_their_own_units(steps: int, batch: int, time_dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    stats.reset()
    x = dropped((batch, steps, 6) if time_dim else (steps, batch, 6), bool(time_dim))
    rows = hints.unbind(x, Steps(time_dim))
    assert len(rows) == steps
    layer = StructuredLinear(6, 2, dtype=torch.float64)
    for t, row in enumerate(rows):
        assert torch.equal(row, x.select(time_dim, t))
        hint = hints.lookup(row)
        assert hint is not None
        assert torch.equal(hint.kept.mask(), row[:1] != 0)
        assert_close(layer(row), linear(row, layer.weight, layer.bias))
    site = stats.sites()["dropout"]
    assert (site.drawn, site.used) == (1, 1)


def test_unbinding_rows_of_other_steps_gives_no_false_hint() -> None:
    torch.manual_seed(0)
    x = dropped((2, 3, 6))
    assert all(is_trusted(row) for row in hints.unbind(x.view(2, 3, 6), TIME_MAJOR)), "of its own steps"
    # A row is trusted here or is not, but what is trusted is true.
    for view in (x.view(3, 2, 6), x.view(6, 1, 6), x.view(1, 6, 6)):
        for row in hints.unbind(view, TIME_MAJOR):
            is_trusted(row)
    (of_two_steps,) = hints.unbind(x.view(1, 6, 6), TIME_MAJOR)
    assert of_two_steps.shape == (6, 6)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=3),
    batch=st.integers(1, 3), sampling=st.sampled_from(["exact", "bernoulli"]), seed=SEEDS,
)  # fmt: skip
def test_concatenated_columns_keep_what_each_keeps(
    sizes: list[tuple[int, bool]], batch: int, sampling: str, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = [
        dropped((batch, n), sampling=sampling) if drop else torch.ones(batch, n, dtype=torch.float64)
        for n, drop in sizes
    ]
    joined = hints.cat(tensors)
    assert torch.equal(joined, torch.cat(tensors, 1))
    hint = hints.lookup(joined)
    assert (hint is not None) is any(drop for _, drop in sizes)
    if hint is not None:
        assert torch.equal(hint.kept.mask(), joined[:1] != 0)


@given(
    steps=st.integers(1, 4), batch=st.integers(1, 3), time_dim=st.sampled_from([0, 1]),
    bare=st.booleans(), sampling=st.sampled_from(["exact", "bernoulli"]), seed=SEEDS,
)  # fmt: skip
def test_stacked_steps_keep_what_each_keeps(
    steps: int, batch: int, time_dim: int, bare: bool, sampling: str, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = [dropped((batch, 6), sampling=sampling) for _ in range(steps)]
    if bare:
        tensors[-1] = tensors[-1].clone()
    stacked = hints.stack(tensors, Steps(time_dim))
    assert torch.equal(stacked, torch.stack(tensors, time_dim))
    is_trusted(stacked)
    assert (hints.lookup(stacked) is not None) or bare or sampling == "bernoulli"
    assert not bare or hints.lookup(stacked) is None


def test_carried_to_fewer_steps() -> None:
    torch.manual_seed(0)
    x = dropped((4, 3, 6))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3, 1]))
    assert hints.lookup(packed.data) is None
    steps = Steps.packed(packed.batch_sizes.tolist())
    hints.carry(x, TIME_MAJOR, packed.data, steps)
    hint = hints.lookup(packed.data)
    assert hint is not None
    assert hint.kept.steps == 3
    assert is_trusted(packed.data)
    lstm = StructuredDropoutLSTM(6, 2, dtype=torch.float64)
    y = lstm(packed)[0].data
    assert stats.sites()["dropout"].used == 1
    expected = lstm(packed._replace(data=packed.data.clone()))[0].data
    assert_close(y, expected)

    bare = torch.zeros(2, 3, 6)
    assert hints.lookup(hints.carry(bare.clone(), TIME_MAJOR, bare, TIME_MAJOR)) is None


def test_inference_mode_has_no_hints_to_trust() -> None:
    with torch.inference_mode():
        x = dropped((3, 4, 6))
        assert hints.lookup(x) is None
        layer = StructuredLinear(6, 2, dtype=torch.float64)
        x.add_(1)
        assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))


def test_a_waived_pattern_is_not_lost() -> None:
    x = dropped((3, 4, 6))
    assert hints.waive(x) is x
    assert stats.sites()["dropout"].lost == 0
    StructuredLinear(6, 2, dtype=torch.float64)(x)
    assert stats.sites()["dropout"].lost == 0
    assert hints.waive(torch.ones(2)).tolist() == [1, 1]


def test_a_hint_made_by_hand() -> None:
    x = torch.zeros(2, 3, 4)
    x[..., 1] = 1
    kept = Kept(torch.ones(2, 1, dtype=torch.int32), 4, 4.0)
    hints.attach(x, [hints.Part(kept)], TIME_MAJOR)
    layer = StructuredLinear(4, 2)
    assert_close(layer(x), linear(x, layer.weight, layer.bias))


def test_other_memory_is_not_trusted() -> None:
    x = dropped((3, 4, 6))
    x.data = torch.randn_like(x)
    assert hints.lookup(x) is None
    assert hints.lookup(x.view(-1, 6)) is None


@pytest.mark.parametrize("ask", [lambda x: x.requires_grad_(), lambda x: x.retain_grad()])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(-1, 6)])
def test_a_tensor_that_is_differentiated_itself_gets_its_whole_gradient(ask: Any, view: Any) -> None:
    linear = StructuredLinear(6, 5, dtype=torch.float64)
    source = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=ask.__code__.co_names == ("retain_grad",))
    x = StructuredDropout(0.5)(source)
    assert hints.lookup(x) is not None
    ask(x)
    linear(view(x)).sum().backward()
    assert_close(x.grad, linear.weight.sum(0).detach().expand_as(x))
