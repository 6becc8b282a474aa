"""The model of rounding: right sums in any order pass, and the faults that tests are there for do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .tolerances import assert_close, of_sum, partial_sums, relative

#: From a product or two to the longest sums of the tests.
LENGTHS = [1, 2, 17, 64, 65, 512, 2100]


def operands(terms: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(terms)
    return torch.randn(8, terms, generator=generator), torch.randn(terms, 8, generator=generator)


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for k in range(a.shape[1]):
        total = total + a[:, k : k + 1] * b[k]
    return total


def largest_first(a: Tensor, b: Tensor) -> Tensor:
    order = (a.abs().amax(0) * b.abs().amax(1)).argsort(descending=True)
    return one_by_one(a[:, order], b[order])


def in_halves(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] == 1:
        return a * b
    half = a.shape[1] // 2
    return in_halves(a[:, :half], b[:half]) + in_halves(a[:, half:], b[half:])


def check(got: Tensor, a: Tensor, b: Tensor) -> None:
    exact = a.double() @ b.double()
    assert_close(got, exact, a.shape[1], depth=1, magnitude=partial_sums(a, b), exact=True)


@pytest.mark.parametrize("way", [torch.matmul, one_by_one, largest_first, in_halves])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", LENGTHS)
def test_a_right_sum_passes(terms: int, dtype: torch.dtype, way: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = operands(terms)
    # In float64, the exact product is one that is as inexact as what is looked at.
    check(way(a.to(dtype), b.to(dtype)), a, b)


@pytest.mark.parametrize("terms", [2, 17, 64])
def test_operands_of_any_kind_pass_where_sums_are_short(terms: int) -> None:
    """Roundings of equal products go all in one direction."""
    a, b = torch.full((2, terms), 0.1), torch.full((terms, 3), 0.1)
    check(one_by_one(a, b), a, b)


def in_tf32(x: Tensor) -> Tensor:
    """The ten upper bits of what follows the point, rounded to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operands in TF32": lambda a, b: (in_tf32(a).double() @ in_tf32(b).double()).float(),
    "sums in float16": lambda a, b: one_by_one(a.half(), b.half()).float(),
    "operands in bfloat16": lambda a, b: (a.bfloat16().double() @ b.bfloat16().double()).float(),
    "a unit left out": lambda a, b: a[:, 1:] @ b[1:],
    "a unit twice": lambda a, b: a @ b + a[:, :1] * b[:1],
    "another unit": lambda a, b: a @ b + (a[:, -1:] - a[:, :1]) * b[:1],
    "a scale of k instead of k + 1 units": lambda a, b: a @ b * (1 + 1 / a.shape[1]),
}


@pytest.mark.parametrize("terms", [length for length in LENGTHS if length > 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_does_not_pass(fault: str, terms: int) -> None:
    a, b = operands(terms)
    with pytest.raises(AssertionError, match="differ by more than rounding"):
        check(FAULTS[fault](a, b), a, b)


def test_sums_of_halves_are_taken_in_float() -> None:
    a, b = (operand.half() for operand in operands(512))
    exact, sums = a.double() @ b.double(), partial_sums(a, b)
    assert_close((a.float() @ b.float()).half(), exact, 512, depth=1, magnitude=sums, exact=True)
    with pytest.raises(AssertionError):
        assert_close(one_by_one(a, b), exact, 512, depth=1, magnitude=sums, exact=True)


def test_longer_sums_and_chains_are_allowed_more() -> None:
    of_length = [of_sum(terms, torch.float32) for terms in range(1, 3000)]
    assert of_length == sorted(of_length)
    assert relative(torch.float32, 10, 3) == 3 * relative(torch.float32, 10, 1)
    assert relative(torch.float64) < 1e-8 * relative(torch.float32) < 1e-8 * relative(torch.bfloat16)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (torch.ones(2), torch.ones(1, 2)), (torch.ones(2), torch.ones(2).double()), ([torch.ones(2)], []),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}), (torch.ones(2), None),
        (torch.tensor([float("nan")]), torch.ones(1)), (torch.ones(1), torch.tensor([float("inf")])),
        (torch.tensor([-float("inf")]), torch.tensor([float("inf")])),
        ([torch.ones(2), torch.zeros(1)], [torch.ones(2)] * 2),
    ],
)  # fmt: skip
def test_what_is_no_rounding_never_passes(got: object, expected: object) -> None:
    with pytest.raises(AssertionError):
        assert_close(got, expected)


def test_infinities_and_nan_pass_where_they_belong() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert_close(values, values.clone())
    assert_close([{"a": values}, None], [{"a": values.clone()}, None])
    assert_close(torch.empty(0, 3), torch.empty(0, 3))
