"""`StructuredDropout` and `StructuredLinear` in the place of `nn.Dropout` and `nn.Linear`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from sd_plugin import Case, StructuredDropout, StructuredLinear, stats

from ..tolerances import assert_close

SEEDS = st.integers(0, 10**6)


def test_it_is_an_nn_dropout() -> None:
    dropout = StructuredDropout(0.25, Case.IV, sampling="bernoulli")
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.25
    assert repr(dropout) == "StructuredDropout(p=0.25, case=IV, sampling=bernoulli)"
    assert not dropout.state_dict()


@given(case=st.sampled_from(list(Case)), p=st.floats(0, 1, exclude_max=True))
def test_identity_where_nothing_is_dropped(case: Case, p: float) -> None:
    x = torch.ones(3, 2, 4)
    assert StructuredDropout(p, case).eval()(x) is x
    assert StructuredDropout(0.0, case)(x) is x
    assert not stats.sites()


def test_p_may_be_changed_at_any_time() -> None:
    dropout, x = StructuredDropout(0.5), torch.ones(3, 2, 8)
    for p, kept in ((0.5, 4), (0.75, 2), (0.0, 8), (0.25, 6)):
        dropout.p = p
        assert (dropout(x) != 0).sum(-1).unique().tolist() == [kept]
    dropout.p = 1.0
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
        dropout(x)
    dropout.eval()
    assert dropout(x) is x


@pytest.mark.parametrize("batch_first", [False, True])
def test_two_dimensions_are_one_time_step(batch_first: bool) -> None:
    torch.manual_seed(0)
    kept = StructuredDropout(0.5, batch_first=batch_first)(torch.ones(50, 8)) != 0
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert kept[0].sum() == 4
    random = StructuredDropout(0.5, "I", batch_first=batch_first)(torch.ones(50, 8)) != 0
    assert not torch.equal(random, random[:1].expand_as(random))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4, 5)])
def test_other_dimensions_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="takes 2 or 3 dimensions"):
        StructuredDropout(0.5)(torch.ones(shape))
    assert StructuredDropout(0.5).eval()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("case", list(Case))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_dropped_and_scaled_alike(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(4, 3, 8, dtype=dtype, requires_grad=True)
    y = StructuredDropout(0.4, case)(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 8)), n=st.integers(1, 6),
    bias=st.booleans(), p=st.floats(0, 0.95), case=st.sampled_from(list(Case)),
    sampling=st.sampled_from(["exact", "bernoulli"]), batch_first=st.booleans(), two_dims=st.booleans(),
    seed=SEEDS,
)  # fmt: skip
def test_equals_linear_with_and_without_a_hint(
    shape: tuple[int, int, int], n: int, bias: bool, p: float, case: Case, sampling: str, batch_first: bool,
    two_dims: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x = torch.randn(shape[1:] if two_dims else shape, dtype=torch.float64, requires_grad=True)
    ours = StructuredLinear(shape[2], n, bias=bias, dtype=torch.float64)
    dropped = StructuredDropout(p, case, batch_first=batch_first, sampling=sampling)(x)
    leaves = [x, *ours.parameters()]
    factors = torch.randn(*x.shape[:-1], n, dtype=torch.float64)

    y = ours(dropped)
    expected = linear(dropped, ours.weight, ours.bias)
    assert_close(y, expected)
    assert_close(
        torch.autograd.grad((y * factors).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * factors).sum(), leaves),
    )
    if p and case.structured:
        assert stats.sites()["dropout"].lost == 0
    plain = torch.randn(x.shape, dtype=torch.float64)
    assert torch.equal(ours(plain), linear(plain, ours.weight, ours.bias))


def test_gradcheck_of_dropout_into_linear() -> None:
    layer = StructuredLinear(5, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        dropped = StructuredDropout(0.5)(x)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (dropped,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(needed: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    layer = StructuredLinear(6, 4)
    x = torch.randn(3, 2, 6, requires_grad=needed[0])
    layer.weight.requires_grad_(needed[1])
    layer.bias.requires_grad_(needed[2])
    layer(StructuredDropout(0.5)(x)).sum().backward()
    assert tuple(leaf.grad is not None for leaf in (x, layer.weight, layer.bias)) == needed


def test_half_products_skip_as_well() -> None:
    torch.manual_seed(0)
    dropped = StructuredDropout(0.5)(torch.randn(3, 2, 32, dtype=torch.bfloat16))
    layer = StructuredLinear(32, 4, dtype=torch.bfloat16)
    y = layer(dropped)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(dropped.clone()))
    assert stats.sites()["dropout"].skipped > 0


def test_adopt_changes_a_plain_linear_in_place_and_nothing_else() -> None:
    plain = nn.Linear(8, 3)
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    parameters = [id(parameter) for parameter in plain.parameters()]
    assert StructuredLinear.adopt(plain) is plain
    assert type(plain) is StructuredLinear
    assert [id(parameter) for parameter in plain.parameters()] == parameters
    plain(StructuredDropout(0.5)(torch.ones(2, 2, 8)))
    assert calls == [1]
    assert stats.sites()["dropout"].used == 1
    assert StructuredLinear.adopt(plain) is plain

    class Own(nn.Linear):
        """A product of its own."""

    own = Own(8, 3)
    assert type(StructuredLinear.adopt(own)) is Own
