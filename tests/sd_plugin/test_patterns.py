"""The four cases of Fig. 1: which units survive, how often, and together with which others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin import (
    Case,
    StackedStructuredLSTM,
    StructuredDropout,
    StructuredDropoutLSTM,
    draw_kept,
    draw_mask,
)
from sd_plugin.kernels import Kept

from ..tolerances import assert_close

#: Standard errors within which a sample mean must be; seeds are fixed, so this fails always or never.
SIGMAS = 5.0
PROBABILITIES = st.floats(0, 1, exclude_max=True)
SIZES = st.integers(1, 40)
SAMPLINGS = st.sampled_from(["exact", "bernoulli"])
NOT_PROBABILITIES = [1.0, 1, 1.5, -0.1, math.nan, math.inf, -math.inf, "half", "0.5", None, [0.5], True, 1j]


def drop(case: str, x: Tensor, p: float, sampling: str = "exact", batch_first: bool = False) -> Tensor:
    return StructuredDropout(p, case, batch_first=batch_first, sampling=sampling)(x)


@given(steps=st.integers(0, 6), size=SIZES, p=PROBABILITIES, locked=st.booleans(), sampling=SAMPLINGS)
def test_indices_are_ascending_int32_without_duplicates(
    steps: int, size: int, p: float, locked: bool, sampling: str
) -> None:
    kept = draw_kept(steps, size, p, locked=locked, sampling=sampling)
    assert kept.indices.dtype == torch.int32
    assert kept.steps == steps
    assert kept.size == size
    for row in kept.indices.tolist():
        units = [unit for unit in row if unit < size] if kept.padded else row
        assert units == sorted(set(units))
        assert row[: len(units)] == units, "padding comes last"
        assert all(0 <= unit < size for unit in units)
        assert all(unit == size for unit in row[len(units) :])
    if locked:
        assert len({tuple(row) for row in kept.indices.tolist()}) <= 1


@given(steps=st.integers(0, 6), size=SIZES, p=PROBABILITIES, locked=st.booleans())
def test_exact_sampling_keeps_round_of_q_h_and_scales_by_h_over_k(
    steps: int, size: int, p: float, locked: bool
) -> None:
    kept = draw_kept(steps, size, p, locked=locked)
    k = max(1, round((1 - p) * size))
    assert kept.width == k
    assert not kept.padded
    assert kept.scale == pytest.approx(size / k)
    if k == size:
        assert bool(kept.mask().all())
        assert kept.scale == 1


@given(steps=st.integers(0, 6), size=SIZES, p=PROBABILITIES, locked=st.booleans())
def test_bernoulli_sampling_scales_by_one_over_q(steps: int, size: int, p: float, locked: bool) -> None:
    kept = draw_kept(steps, size, p, locked=locked, sampling="bernoulli")
    assert kept.scale == pytest.approx(1 / (1 - p))
    assert kept.width <= size


@given(steps=st.integers(0, 4), batch=st.integers(0, 4), size=SIZES, p=PROBABILITIES, locked=st.booleans())
def test_mask_is_zero_or_one_over_q(steps: int, batch: int, size: int, p: float, locked: bool) -> None:
    mask = draw_mask(steps, batch, size, p, locked=locked, dtype=torch.float64)
    assert mask.shape == (steps, batch, size)
    assert mask.dtype == torch.float64
    kept = mask[mask != 0]
    assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    if locked and steps:
        assert torch.equal(mask, mask[:1].expand_as(mask))


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("p", [0.1, 0.35, 0.5, 0.8])
def test_every_unit_is_kept_with_probability_q(p: float, sampling: str) -> None:
    torch.manual_seed(1)
    steps, size = 20_000, 20
    kept = draw_kept(steps, size, p, sampling=sampling)
    q = 1 / kept.scale
    error = (kept.mask().double().mean(0) - q).abs().max().item()
    assert error <= SIGMAS * math.sqrt(q * (1 - q) / steps)


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_steps_are_independent(sampling: str) -> None:
    torch.manual_seed(2)
    steps, size, p = 20_000, 12, 0.5
    centred = draw_kept(steps, size, p, sampling=sampling).mask().double() - (1 - p)
    for lag in (1, 2):
        correlation = centred[lag:].t() @ centred[:-lag] / (steps - lag) / (p * (1 - p))
        assert correlation.abs().max().item() <= SIGMAS / math.sqrt(steps - lag)


@pytest.mark.parametrize("case", ["I", "II", "III", "IV"])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
def test_what_a_case_shares_over_batch_and_time(case: str, p: float) -> None:
    """Rows or steps that share units are equal; others agree as often as independent draws do."""
    torch.manual_seed(3)
    steps, batch, size = 30, 30, 60
    kept = drop(case, torch.ones(steps, batch, size), p) != 0
    structured, locked = case in ("III", "IV"), case in ("II", "IV")

    def check(shared: bool, first: Tensor, second: Tensor, independent: int) -> None:
        agreement = (first == second).double().mean().item()
        if shared:
            assert agreement == 1
            return
        expected = p * p + (1 - p) * (1 - p)
        # At most 1/4 variance for each pair of units; correlations within a step only narrow it.
        assert abs(agreement - expected) <= SIGMAS * 0.5 / math.sqrt(independent)

    check(structured, kept[:, 1:], kept[:, :-1], size * (1 if locked else steps))
    check(locked, kept[1:], kept[:-1], size * (1 if structured else batch))
    assert Case(case).structured is structured
    assert Case(case).locked is locked
    assert Case.of(structured, locked) is Case(case)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("case", "sampling"), [("I", "exact"), ("III", "exact"), ("III", "bernoulli")])
def test_dropping_is_unbiased(case: str, sampling: str, batch_first: bool) -> None:
    """E[drop(x)] = x, over the time steps of one long input; p · H is not a whole number."""
    torch.manual_seed(4)
    steps, size, p = 20_000, 9, 0.4
    x = torch.randn(size, dtype=torch.float64)
    shape = (1, steps, size) if batch_first else (steps, 1, size)
    mean = drop(case, x.expand(shape), p, sampling, batch_first).mean((0, 1))
    k = round((1 - p) * size)
    q = k / size if (case, sampling) == ("III", "exact") else 1 - p
    error = (mean - x).abs() / (x.abs() * math.sqrt((1 - q) / q / steps))
    assert error.max().item() <= SIGMAS


@pytest.mark.parametrize("case", ["II", "IV"])
def test_locked_dropping_is_unbiased_over_calls(case: str) -> None:
    torch.manual_seed(5)
    x = torch.ones(2, 1, 8, dtype=torch.float64)
    calls = 4000
    mean = sum(drop(case, x, 0.5) for _ in range(calls)) / calls
    assert (mean - 1).abs().max().item() <= SIGMAS / math.sqrt(calls)


@given(steps=st.integers(0, 3), batch=st.integers(0, 3), size=SIZES, case=st.sampled_from(list(Case)))
def test_p_zero_keeps_everything(steps: int, batch: int, size: int, case: Case) -> None:
    x = torch.ones(steps, batch, size)
    assert drop(case, x, 0.0) is x
    assert torch.equal(draw_kept(steps, size, 0.0).multiplier(torch.float32), torch.ones(steps, size))
    assert torch.equal(draw_mask(steps, batch, size, 0.0), x)


@given(
    case=st.sampled_from(list(Case)), steps=st.integers(0, 3), batch=st.integers(0, 3),
    size=st.integers(1, 5), p=PROBABILITIES, sampling=SAMPLINGS, batch_first=st.booleans(),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_dropped_element_is_zero_and_a_kept_one_scaled(
    case: Case, steps: int, batch: int, size: int, p: float, sampling: str, batch_first: bool, seed: int
) -> None:
    """Of any shape, also without steps, without rows or with one unit."""
    torch.manual_seed(seed)
    x = torch.randn((batch, steps, size) if batch_first else (steps, batch, size), dtype=torch.float64)
    y = drop(case, x, p, sampling, batch_first)
    assert y.shape == x.shape
    factor = (y / x).flatten()
    exact = case.structured and sampling == "exact"
    scale = size / max(1, round((1 - p) * size)) if exact else 1 / (1 - p)
    kept = factor[factor != 0]
    assert_close(kept, torch.full_like(kept, scale))
    if exact and y.numel():
        assert bool((y != 0).any(-1).all()), "at least one unit is kept"


@pytest.mark.parametrize("p", [0.9, 0.999999, 1 - 1e-16])
@pytest.mark.parametrize("size", [1, 2, 650])
def test_p_close_to_one_keeps_a_unit(p: float, size: int) -> None:
    kept = draw_kept(5, size, p)
    assert kept.width >= 1
    assert bool(kept.mask().any(1).all())
    assert math.isfinite(kept.scale)


@pytest.mark.parametrize("p", NOT_PROBABILITIES, ids=repr)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("p", lambda p: draw_kept(2, 3, p)),
        ("p", lambda p: draw_mask(2, 3, 4, p)),
        ("p", lambda p: StructuredDropout(p)),
        ("input_dropout", lambda p: StructuredDropoutLSTM(2, 3, input_dropout=p)),
        ("output_dropout", lambda p: StructuredDropoutLSTM(2, 3, output_dropout=p)),
        ("recurrent_dropout", lambda p: StructuredDropoutLSTM(2, 3, recurrent_dropout=p)),
        ("recurrent_dropout", lambda p: StackedStructuredLSTM(1, 2, 3, recurrent_dropout=p)),
        ("output_dropout", lambda p: StackedStructuredLSTM(1, 2, 3, output_dropout=p)),
    ],
)
def test_a_probability_out_of_range_is_named(p: Any, name: str, make: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*\[0, 1\)"):
        make(p)


@pytest.mark.parametrize("p", [1.0, -0.5, math.nan, "0.5"], ids=repr)
def test_dropout_between_layers_out_of_range(p: Any) -> None:
    with pytest.raises(ValueError, match=r"dropout.*\[0, 1"):
        StructuredDropoutLSTM(2, 3, 2, dropout=p)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        StackedStructuredLSTM(2, 2, 3, dropout=p)


def test_unknown_case_and_sampling_are_named() -> None:
    with pytest.raises(ValueError, match="'V' is not a valid Case"):
        StructuredDropout(0.5, "V")
    for make in (StructuredDropout, lambda p, **kw: draw_kept(1, 2, p, **kw)):
        with pytest.raises(ValueError, match="sampling must be one of exact, bernoulli, got 'poisson'"):
            make(0.5, sampling="poisson")


@given(case=st.sampled_from(list(Case)), sampling=SAMPLINGS, seed=st.integers(0, 2**31))
def test_the_seed_decides(case: Case, sampling: str, seed: int) -> None:
    x = torch.ones(4, 3, 16)
    torch.manual_seed(seed)
    first, second = drop(case, x, 0.5, sampling), drop(case, x, 0.5, sampling)
    torch.manual_seed(seed)
    assert torch.equal(drop(case, x, 0.5, sampling), first)
    assert torch.equal(drop(case, x, 0.5, sampling), second)


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_a_generator_of_ones_own_decides_alone(sampling: str) -> None:
    def kept(seed: int) -> Kept:
        return draw_kept(4, 30, 0.5, sampling=sampling, generator=torch.Generator().manual_seed(seed))

    def mask(seed: int) -> Tensor:
        return draw_mask(4, 2, 30, 0.5, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(kept(1).indices, kept(1).indices)
    assert not torch.equal(kept(1).mask(), kept(2).mask())
    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
