"""How far a right result may lie from the exact one: one model of rounding, and no other tolerance, for all tests.

Nothing in it is measured on a machine. It holds for every order of a sum, with and without fused multiply-adds, so for
every processor, BLAS and number of threads (Higham 2002, *Accuracy and Stability of Numerical Algorithms*, 3.1 and
4.2). With ``u`` the unit roundoff of the dtype in which sums are taken:

- A sum of ``n`` products has an error of at most ``n u`` times the largest partial sum of absolute values, whatever the
  operands are. Roundings of random operands cancel: ``8 sqrt(n) u`` is passed with a probability below ``1e-13 n``
  (Higham and Mary 2019, theorem 2.4). The smaller of both counts, so operands of long sums have to be drawn at random.
- ``depth`` operations of which each takes the results of the one before add up their errors.
- A result is rounded to its own dtype, a scale to the same, and so is their product.

What a test must notice is far larger, and test_tolerances.py shows that it does not pass: a product that is left out or
counted twice is an error of the size of one product; operands in TF32 have ``2 ** -11`` in place of ``2 ** -24``, sums
in half precision ``2 ** -11`` or ``2 ** -8``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

#: Relative error of an operand that is rounded to TF32.
TF32 = 2.0**-11
#: Of the modules that tests build: at most so many terms in a sum, and so many operations between operands and results.
SMALL_TERMS, SMALL_DEPTH = 64, 8
#: Tests take operands of size about one.
SMALLEST_SUM = 0.1
#: Standard deviations.
_SURE = 8.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of a number that is rounded to ``dtype``."""
    return float(torch.finfo(dtype).eps) / 2


def of_sum(terms: int, dtype: torch.dtype) -> float:
    """Largest error of a sum of ``terms`` products in ``dtype``, as a share of the largest partial sum."""
    roundings = terms + 1
    return min(roundings, _SURE * sqrt(roundings)) * unit_roundoff(dtype)


def sums_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of products of ``dtype`` are taken."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def partial_sums(a: Tensor, b: Tensor) -> Tensor:
    """How large a partial sum of the product ``a @ b`` gets, in float64, for operands of mean zero drawn independently.

    At most the sum of all absolute values; in a long sum less, since signs differ.
    """
    a, b = a.double(), b.double()
    return torch.minimum(a.abs() @ b.abs(), _SURE * (a.square() @ b.square()).sqrt())


def relative(dtype: torch.dtype, terms: int = SMALL_TERMS, depth: int = SMALL_DEPTH) -> float:
    """Largest difference between two results, as a share of their size: for ``pytest.approx(..., rel=)``."""
    return 2 * depth * (of_sum(terms, sums_of(dtype)) + unit_roundoff(dtype))


def of_training(dtype: torch.dtype, updates: int) -> float:
    """Largest difference between the losses of two trainings, as a share of them: every update adds its own."""
    return updates * relative(dtype)


def allowed(
    exact: Tensor,
    dtype: torch.dtype,
    terms: int = SMALL_TERMS,
    depth: int = SMALL_DEPTH,
    magnitude: Tensor | float | None = None,
    sums: torch.dtype | None = None,
    operands: float = 0.0,
) -> Tensor:
    """Largest error of each element of a result in ``dtype``.

    Args:
        exact: what it should be.
        terms: of the longest sum; depth: of operations in a row.
        magnitude: the largest partial sums (:func:`partial_sums`); by default the largest element, or
            :data:`SMALLEST_SUM` if that is larger: small results are differences of what is not as small.
        sums: the dtype in which they are taken.
        operands: relative error to which operands are rounded first, as :data:`TF32`.
    """
    exact = exact.detach().double()
    if magnitude is None:
        finite = exact[exact.isfinite()]
        magnitude = max(SMALLEST_SUM, float(finite.abs().max())) if finite.numel() else SMALLEST_SUM
    of_operation = of_sum(terms, sums or sums_of(dtype)) + 2 * operands
    # Not the dtype's own limit: what is computed in float32 is rounded to zero there.
    smallest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).tiny
    own = 3 * unit_roundoff(dtype) * exact.abs() + (depth - 1) * unit_roundoff(dtype) * magnitude
    return depth * of_operation * magnitude + own + smallest


def assert_close(
    got: Any,
    expected: Any,
    terms: int = SMALL_TERMS,
    depth: int = SMALL_DEPTH,
    *,
    exact: bool = False,
    name: str = "",
    **model: Any,
) -> None:
    """Shapes are the same, and nothing differs by more than rounding.

    Args:
        got: a tensor, or a sequence or mapping of these; expected: likewise.
        terms: see :func:`allowed`, as for the other arguments.
        exact: ``expected`` has no error of its own; else both may have one, in opposite directions.
        name: what a failure calls it.
    """
    if isinstance(expected, Mapping):
        assert got.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_close(got[key], value, terms, depth, exact=exact, name=f"{name}{key}", **model)
        return
    if isinstance(expected, Sequence):
        assert len(got) == len(expected), name
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_close(one, other, terms, depth, exact=exact, name=f"{name}[{index}]", **model)
        return
    if expected is None:
        assert got is None, name
        return
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    assert exact or got.dtype == expected.dtype, f"{name}: {got.dtype}, not {expected.dtype}"
    bound = allowed(expected.cpu(), got.dtype, terms, depth, **model) * (1 if exact else 2)
    _compare(name, got.detach().cpu().double(), expected.detach().cpu().double(), bound)


def _compare(name: str, got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Infinities and what is no number have to be where they are expected."""
    finite = expected.isfinite()
    same = torch.where(finite, (got - expected).abs() <= bound, (got == expected) | (got.isnan() & expected.isnan()))
    if bool(same.all()):
        return
    excess = torch.where(same, 0.0, ((got - expected).abs() / bound).nan_to_num(float("inf"), float("inf")))
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape)) if excess.dim() else ()
    raise AssertionError(
        f"{name or 'a result'}: {int((~same).sum())} of {same.numel()} elements differ by more than rounding; "
        f"{list(at)} is {float(got[at])}, not {float(expected[at])}, where {float(bound[at]):.1e} is allowed"
    )
