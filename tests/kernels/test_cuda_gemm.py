"""The CUDA products, emulated on the CPU, against a float64 product of zeroed and scaled operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_plugin.kernels import BackendError, Kept, Steps
from sd_plugin.kernels.cuda import choices, driver, gemm
from sd_plugin.kernels.cuda.precision import Precision, of_products

from ..emulation.emulator import EmulatedDriver
from ..tolerances import assert_close, partial_sums, unit_roundoff
from .cases import STRIDES, Layout, kept_units, noise_of, rounded, strided, tensor_of

EMULATED = EmulatedDriver()
pytestmark = pytest.mark.skipif(EMULATED.reason_unavailable() is not None, reason="no C++ compiler")

PRECISIONS = pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.name)
WAYS = pytest.mark.parametrize("way", ["skip", "dense"])
SEEDS = st.integers(0, 10**6)
#: Around the borders of what a block, a warp and a copy take.
BATCHES = st.sampled_from([1, 3, 8, 9, 20, 33, 66])
UNITS = st.sampled_from([1, 5, 31, 40, 64, 67, 100, 131])
COLUMNS = st.sampled_from([1, 4, 7, 31, 33, 64, 127, 130, 264])


@pytest.fixture
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that the test is parametrized with."""
    monkeypatch.setenv(choices.PRODUCTS, request.getfixturevalue("way"))


@contextmanager
def emulated(seed: int = 1) -> Iterator[None]:
    """Kernels run on the CPU, in an order drawn from ``seed``."""
    EMULATED.seed, EMULATED.launches = seed + 1, 0
    with driver.use(EMULATED):
        yield


@st.composite
def large_layouts(draw: st.DrawFn) -> Layout:
    """Time-major, batch-first or packed, with more rows than a block takes now and then."""
    kind, batch = draw(st.sampled_from(["time-major", "batch-first", "packed"])), draw(BATCHES)
    count = draw(st.integers(1, 3 if batch < 30 else 2))
    if kind == "packed":
        rest = draw(st.lists(st.integers(0, batch), min_size=count - 1, max_size=count - 1))
        sizes = [batch, *sorted(rest, reverse=True)]
        of_row = torch.tensor([t for t, n in enumerate(sizes) for _ in range(n)])
        return Layout(Steps.packed(sizes), count, (count,) * batch, of_row)
    steps_of_row = torch.arange(count).unsqueeze(1).expand(count, batch)
    time_dim = int(kind == "batch-first")
    return Layout(Steps(time_dim), count, (count,) * batch, steps_of_row.t() if time_dim else steps_of_row)


def factors(kept: Kept | None, layout: Layout, size: int) -> Tensor:
    """What each element of an activation counts: a dense ``[rows, size]`` multiplier."""
    if kept is None:
        return torch.ones(layout.rows(size), dtype=torch.float64)
    return kept.multiplier(torch.float64)[layout.step_of_row]


def check(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int, precision: Precision) -> None:
    """Within the rounding of operands, of float32 sums of ``terms`` products, and of ``got``."""
    # Half types of dense products are rounded once as a product, and once more when scaled or added to.
    of_operands = rounded(precision) + (0.0 if precision.dtype == torch.float32 else unit_roundoff(precision.dtype))
    assert_close(got, exact, terms + 2, depth=1, magnitude=magnitude, operands=of_operands, exact=True)


@st.composite
def results(draw: st.DrawFn) -> torch.dtype | None:
    """The dtype of a result."""
    return draw(st.sampled_from([None, torch.float32]))


@PRECISIONS
@WAYS
@pytest.mark.usefixtures("forced")
@settings(max_examples=40)
@given(
    data=st.data(), layout=large_layouts(), k=UNITS, n=COLUMNS, seed=SEEDS, how=STRIDES, biased=st.booleans(),
    dtype=results(),
)  # fmt: skip
def test_forward_product(
    precision: Precision, way: str, data: st.DataObject, layout: Layout, k: int, n: int, seed: int, how: str,
    biased: bool, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    kept, real = data.draw(kept_units(layout.count, k)), precision.dtype
    x, weight_t = tensor_of(seed, *layout.rows(k)).to(real), tensor_of(seed + 1, k, n).to(real)
    bias = tensor_of(seed + 2, n).to(real) if biased else None
    factor = factors(kept, layout, k)
    dropped = x.double() * factor
    # What is in a dropped column does not count, not even when a product with zero would not hide it.
    x = torch.where(factor != 0, x, float("nan"))

    with emulated(seed):
        y = gemm.fp(strided(x, how), gemm.gemm_pack(weight_t), kept, layout.steps, precision, dtype, bias)

    assert y.dtype == (dtype or real)
    added = torch.zeros(n) if bias is None else bias.double()
    magnitude = partial_sums(dropped, weight_t) + added.abs()
    check(y, dropped @ weight_t.double() + added, magnitude, k, precision)


@PRECISIONS
@WAYS
@pytest.mark.usefixtures("forced")
@settings(max_examples=40)
@given(data=st.data(), layout=large_layouts(), k=UNITS, n=COLUMNS, seed=SEEDS, how=STRIDES, dtype=results())
def test_backward_product(
    precision: Precision, way: str, data: st.DataObject, layout: Layout, k: int, n: int, seed: int, how: str,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    kept, real = data.draw(kept_units(layout.count, k)), precision.dtype
    dy, weight_t = tensor_of(seed, *layout.rows(n)).to(real), tensor_of(seed + 1, k, n).to(real)
    factor = factors(kept, layout, k)

    with emulated(seed):
        dx = gemm.bp(strided(dy, how), gemm.gemm_pack(weight_t), kept, layout.steps, precision, dtype)

    assert dx.dtype == (dtype or real)
    assert bool((dx[factor == 0] == 0).all()), "the gradient of a dropped column is exactly zero"
    magnitude = partial_sums(dy, weight_t.t()) * factor
    check(dx, dy.double() @ weight_t.double().t() * factor, magnitude, n, precision)


@PRECISIONS
@WAYS
@pytest.mark.usefixtures("forced")
@settings(max_examples=40)
@given(
    data=st.data(), layout=large_layouts(), k=UNITS, n=COLUMNS, seed=SEEDS, how=st.tuples(STRIDES, STRIDES),
    dtype=results(),
)  # fmt: skip
def test_weight_gradient_product(
    precision: Precision, way: str, data: st.DataObject, layout: Layout, k: int, n: int, seed: int,
    how: tuple[str, str], dtype: torch.dtype | None,
) -> None:  # fmt: skip
    kept, real = data.draw(kept_units(layout.count, k)), precision.dtype
    x, dy = tensor_of(seed, *layout.rows(k)).to(real), tensor_of(seed + 1, *layout.rows(n)).to(real)
    factor = factors(kept, layout, k)
    dropped, rows = (x.double() * factor).reshape(-1, k), dy.double().reshape(-1, n)
    x = torch.where(factor != 0, x, float("nan"))

    with emulated(seed):
        dw = gemm.wg(strided(x, how[0]), strided(dy, how[1]), kept, layout.steps, precision, dtype)

    assert dw.dtype == (dtype or real)
    assert dw.t().is_contiguous(), "as the parameter is"
    check(dw, dropped.t() @ rows, partial_sums(dropped.t(), rows), rows.shape[0], precision)


def all_products(x: Tensor, weight_t: Tensor, dy: Tensor, kept: Kept, seed: int = 1) -> list[Tensor]:
    """The three results, time-major."""
    with emulated(seed):
        packed = gemm.gemm_pack(weight_t)
        return [
            gemm.gemm_fp(x, packed, kept, Steps(), None),
            gemm.gemm_bp(dy, packed, kept, Steps()),
            gemm.gemm_wg(x, dy, kept, Steps()),
        ]


@WAYS
@pytest.mark.usefixtures("forced")
@settings(max_examples=40)
@given(seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_lists_that_are_none_do_no_harm(way: str, seed: int, dtype: torch.dtype) -> None:
    # Results are anything; what is not there is not accessed.
    generator = torch.Generator().manual_seed(seed)
    anything = torch.randint(-(2**31), 2**31, (2, 70), generator=generator)
    near = torch.randint(-3, 90, (2, 70), generator=generator)
    units = torch.where(noise_of(seed, 2, 70) < 0.1, anything, near).int()
    kept = Kept(units, 80, 1.0, padded=True)
    operands = [tensor_of(0, *shape).to(dtype) for shape in ((2, 5, 80), (80, 20), (2, 5, 20))]
    shapes = [tuple(tensor.shape) for tensor in all_products(*operands, kept)]
    assert shapes == [(2, 5, 20), (2, 5, 80), (80, 20)]


@WAYS
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (3, 0, 3, 4), (2, 2, 3, 0), (2, 2, 0, 4)])
def test_nothing_to_multiply(way: str, shape: tuple[int, int, int, int]) -> None:
    count, batch, k, n = shape
    kept = Kept(torch.empty(count, 0, dtype=torch.int32), k)
    for pattern in (kept, Kept.all(count, k)):
        y, dx, dw = all_products(torch.ones(count, batch, k), torch.ones(k, n), torch.ones(count, batch, n), pattern)
        assert y.shape == (count, batch, n) and dx.shape == (count, batch, k) and dw.shape == (k, n)
        if pattern is kept or 0 in shape[:3]:
            assert not y.any() and not dw.any()
        if pattern is kept or n == 0:
            assert not dx.any()


@WAYS
@pytest.mark.usefixtures("forced")
def test_many_steps_and_many_units(way: str) -> None:
    # More steps than are looked up together, and more units than a block of dropped operands has.
    kept = Kept(noise_of(0, 300, 5).argsort(1)[:, :2].sort(1).values.int(), 5, 2.5)
    x, dy = tensor_of(1, 300, 2, 5).float(), tensor_of(2, 300, 2, 7).float()
    _, _, dw = all_products(x, torch.ones(5, 7), dy, kept)
    dropped = x.double() * kept.multiplier(torch.float64).unsqueeze(1)
    dropped, rows = dropped.flatten(0, 1).t(), dy.flatten(0, 1).double()
    check(dw, dropped @ rows, partial_sums(dropped, rows), 600, Precision.STRICT)

    mask = noise_of(3, 2, 1100) < 0.5
    units = torch.where(mask, torch.arange(1100), 1100).sort(1).values.int()
    kept = Kept(units[:, : int(mask.sum(1).max())], 1100, 2.0, padded=True)
    x = torch.where(mask.unsqueeze(1), tensor_of(4, 2, 9, 1100).float(), float("nan"))
    y, _, _ = all_products(x, torch.ones(1100, 1), torch.ones(2, 9, 1), kept)
    kept_x = x.double().nan_to_num() * 2
    check(y, kept_x.sum(2, keepdim=True), partial_sums(kept_x, torch.ones(1100, 1)), 1100, Precision.STRICT)


@pytest.mark.parametrize("way", ["skip"])
@pytest.mark.usefixtures("forced")
@PRECISIONS
def test_the_order_of_threads_does_not_show(way: str, precision: Precision) -> None:
    kept = Kept(noise_of(0, 2, 90).argsort(1)[:, :50].sort(1).values.int(), 90, 1.8)
    operands = [tensor_of(1, *shape).to(precision.dtype) for shape in ((2, 11, 90), (90, 140), (2, 11, 140))]
    results = [all_products(*operands, kept, seed=seed) for seed in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@WAYS
@pytest.mark.usefixtures("forced")
def test_an_overflow_in_dy_stays_in_kept_units(way: str) -> None:
    kept = Kept(torch.tensor([[1, 4, 4], [4, 4, 4]], dtype=torch.int32), 4, 1.0, padded=True)
    dy = torch.full((2, 1, 2), float("inf"))
    _, dx, dw = all_products(torch.ones(2, 1, 4), torch.ones(4, 2), dy, kept)
    assert dx[:, 0].tolist() == [[0, float("inf"), 0, 0], [0, 0, 0, 0]]
    if way == "skip":  # a dense product sums over all steps: infinity times the zero of another one is no number
        assert dw.tolist() == [[0, 0], [float("inf")] * 2, [0, 0], [0, 0]]


@pytest.mark.parametrize("way", ["skip"])
@pytest.mark.usefixtures("forced")
def test_no_races(way: str) -> None:
    # Five times slower, so few and small; every kernel over several tiles of everything.
    kept = Kept(noise_of(0, 3, 150).argsort(1)[:, :75].sort(1).values.int(), 150, 2.0)
    races = EmulatedDriver(races=True)
    for precision in Precision:
        shapes = (3, 10, 150), (150, 140), (3, 10, 140)
        x, weight_t, dy = (tensor_of(1, *shape).to(precision.dtype) for shape in shapes)
        with driver.use(races):
            packed = gemm.gemm_pack(weight_t)
            gemm.fp(x, packed, kept, Steps(), precision)
            gemm.bp(dy, packed, kept, Steps(), precision)
            gemm.wg(x, dy, kept, Steps(), precision)
            gemm._keep(x, torch.empty_like(x), kept, Steps(), 2.0)
    kept = Kept(noise_of(0, 260, 5).argsort(1)[:, :2].sort(1).values.int(), 5, 2.5)
    with driver.use(races):
        gemm.wg(torch.ones(260, 1, 5), torch.ones(260, 1, 3), kept, Steps(), Precision.STRICT)


def test_packing_is_a_snapshot() -> None:
    weight_t = torch.ones(3, 5).t().requires_grad_()
    with emulated():
        packed = gemm.gemm_pack(weight_t)
    with torch.no_grad():
        weight_t.fill_(2)
    assert packed.matrix.tolist() == [[1] * 3] * 5 and not packed.rows[:, 3:].any()
    assert packed.rows.shape == (5, 4) and not packed.rows.requires_grad and packed.units == 5


def test_wrong_operands_are_named() -> None:
    x, kept = torch.ones(1, 2, 3), None
    with emulated():
        packed = gemm.gemm_pack(torch.ones(3, 4))
        with pytest.raises(TypeError, match=r"x must be torch.float32, got torch.float16"):
            gemm.fp(x.half(), packed, kept, Steps(), Precision.STRICT)
        with pytest.raises(TypeError, match=r"weight must be torch.float16, got torch.float32"):
            gemm.bp(torch.ones(1, 2, 4).half(), packed, kept, Steps(), Precision.F16)
        with pytest.raises(TypeError, match=r"weight_t must be float32, float16 or bfloat16, got torch.float64"):
            gemm.gemm_pack(torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="weight_t must be on a cuda device, got cpu"):
        gemm.gemm_pack(torch.ones(3, 4))


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(torch.zeros(1, 4, dtype=torch.int32), 10)
    table = choices.Table("a test", {("fp", Precision.STRICT): 0.4, ("fp", Precision.TF32): 0.39})
    monkeypatch.setattr(choices, "table", lambda: table)
    monkeypatch.delenv(choices.PRODUCTS, raising=False)
    assert choices.skips("fp", Precision.STRICT, kept) and not choices.skips("fp", Precision.TF32, kept)
    monkeypatch.setenv(choices.PRODUCTS, "dense")
    assert not choices.skips("fp", Precision.STRICT, kept)
    monkeypatch.setenv(choices.PRODUCTS, "Skip ")
    assert choices.skips("fp", Precision.TF32, kept)
    monkeypatch.setenv(choices.PRODUCTS, "sparse")
    with pytest.raises(BackendError, match=r"SD_PLUGIN_CUDA_PRODUCTS=sparse .* auto, skip, dense"):
        choices.skips("fp", Precision.STRICT, kept)


def test_the_table_is_whole() -> None:
    table = choices.table()
    assert table.source
    assert set(table.largest_kept_fraction) == {(phase, p) for phase in ("fp", "bp", "wg") for p in Precision}
    assert all(0 <= fraction <= 1 for fraction in table.largest_kept_fraction.values())


def test_which_recurrence_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_plugin.kernels.cuda.tiling import Tile

    tile = Tile(Precision.STRICT, 4, 1, True)
    monkeypatch.setenv(choices.RECURRENCE, "auto")
    assert choices.recurrence(tile) is tile and choices.recurrence(None) is None
    monkeypatch.setenv(choices.RECURRENCE, "steps")
    assert choices.recurrence(tile) is None
    monkeypatch.setenv(choices.RECURRENCE, "persistent")
    assert choices.recurrence(tile) is tile
    with pytest.raises(BackendError, match="does not fit"):
        choices.recurrence(None)
    monkeypatch.setenv(choices.RECURRENCE, "fast")
    with pytest.raises(BackendError, match=r"SD_PLUGIN_CUDA_RECURRENCE=fast .* auto, persistent, steps"):
        choices.recurrence(tile)


def test_tf32_is_used_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choices.PRODUCTS, "skip")
    kept, x = Kept(torch.tensor([[0]], dtype=torch.int32), 2), torch.tensor([[[1 + 2.0**-12, 0]]])
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    try:
        for allowed in (False, True):
            flags.allow_tf32 = allowed
            assert of_products(torch.float32) is (Precision.TF32 if allowed else Precision.STRICT)
            with emulated():
                y = gemm.gemm_fp(x, gemm.gemm_pack(torch.ones(2, 1)), kept, Steps(), None)
            assert (y.item() == 1) is allowed
    finally:
        flags.allow_tf32 = before
