"""Kept units and time layouts, against Python sets and lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_plugin.kernels import Kept

from .cases import Layout, kept_units, layouts, tensor_of

STEPS, SIZES = st.integers(0, 4), st.integers(1, 7)


def units(kept: Kept) -> list[set[int]]:
    """The kept units of each step."""
    return [{unit for unit in row if unit < kept.size} for row in kept.indices.tolist()]


@st.composite
def some_kept(draw: st.DrawFn, steps: st.SearchStrategy[int] = STEPS) -> Kept:
    count, size = draw(steps), draw(SIZES)
    return draw(kept_units(count, size).filter(lambda kept: kept is not None))


@given(kept=some_kept())
def test_mask_and_multiplier_show_the_kept_units(kept: Kept) -> None:
    mask = kept.mask()
    assert mask.shape == (kept.steps, kept.size)
    assert mask.dtype == torch.bool
    assert [set(row.nonzero().flatten().tolist()) for row in mask] == units(kept)
    multiplier = kept.multiplier(torch.float64)
    assert torch.equal(multiplier, mask.double() * kept.scale)
    assert kept.width >= max((len(row) for row in units(kept)), default=0)


@given(parts=st.integers(0, 4).flatmap(lambda t: st.lists(some_kept(st.just(t)), min_size=1, max_size=3)))
def test_concat_is_the_union_of_shifted_units(parts: list[Kept]) -> None:
    whole = Kept.concat(parts)
    assert whole.scale == 1.0
    assert torch.equal(whole.mask(), torch.cat([part.mask() for part in parts], 1))
    assert torch.equal(whole.indices, whole.indices.sort(1).values), "ascending, padding last"


@st.composite
def alike(draw: st.DrawFn) -> list[Kept]:
    """Patterns of as many units, unscaled."""
    size = draw(SIZES)
    units_of = kept_units(draw(st.integers(0, 3)), size)
    return [(draw(units_of) or Kept.all(1, size)).unscaled() for _ in range(draw(st.integers(1, 4)))]


@given(parts=alike())
def test_in_time_has_the_steps_of_one_after_the_other(parts: list[Kept]) -> None:
    whole = Kept.in_time(parts)
    assert units(whole) == [step for part in parts for step in units(part)]
    assert torch.equal(whole.indices, whole.indices.sort(1).values), "ascending, padding last"
    assert whole.padded or all(len(step) == whole.width for step in units(whole))
    with pytest.raises(ValueError, match="size or scale"):
        Kept.in_time([*parts, Kept.all(1, whole.size + 1)])
    with pytest.raises(ValueError, match="size or scale"):
        Kept.in_time([*parts, replace(whole, scale=2.0)])


@given(kept=some_kept(st.integers(1, 4)), data=st.data())
def test_part_of_the_steps(kept: Kept, data: st.DataObject) -> None:
    t = data.draw(st.integers(0, kept.steps - 1))
    assert units(kept.at(t)) == units(kept)[t : t + 1]
    assert units(kept.first(t)) == units(kept)[:t]
    assert kept.at(t).scale == kept.first(t).scale == kept.scale
    assert units(kept.unscaled()) == units(kept)
    assert kept.unscaled().scale == 1.0


@given(steps=STEPS, size=st.integers(0, 7))
def test_all_keeps_every_unit_unscaled(steps: int, size: int) -> None:
    kept = Kept.all(steps, size)
    assert units(kept) == [set(range(size))] * steps
    assert torch.equal(kept.multiplier(torch.float32), torch.ones(steps, size))


@given(layout=layouts(), seed=st.integers(0, 10**6))
def test_layouts_split_and_spread_by_step(layout: Layout, seed: int) -> None:
    x = tensor_of(seed, *layout.rows(3))
    steps = layout.steps
    steps.check("x", x)
    assert steps.count(x) == layout.count
    assert steps.batch(x) == (layout.batch if layout.count or steps.batch_sizes is None else 0)

    rows = steps.split(x)
    assert len(rows) == layout.count
    for t, row in enumerate(rows):
        assert torch.equal(row, x[layout.step_of_row == t])

    per_step = tensor_of(seed + 1, layout.count, 3)
    assert torch.equal(steps.spread(per_step).expand_as(x), per_step[layout.step_of_row])
