"""What is told of raw samples: ratios, bounds, efficiencies and tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_plugin.bench import summary
from sd_plugin.bench.columns import COLUMNS, DENSE, NR_RH_ST, NR_ST, PHASES, STOCK
from sd_plugin.bench.summary import Spread

X = "\N{MULTIPLICATION SIGN}"
POSITIVE = st.floats(1e-3, 1e3)


def product(dense: float, units: int, kept: int, skipping: float | None = None, count: int = 1) -> dict[str, Any]:
    """A product whose three phases take the same, perfect unless ``skipping`` says otherwise."""
    ideal = dense * kept / units if skipping is None else skipping
    samples = {STOCK: [dense], DENSE: [dense], NR_RH_ST: [ideal]}
    ms = dict.fromkeys(PHASES, samples)
    return {"units": units, "kept": {NR_RH_ST: kept}, "count": count, "ms": ms, "pack_ms": [0.0]}


def workload(products: list[dict[str, Any]], **step_ms: float) -> dict[str, Any]:
    columns = {name.replace("_dense", "-dense"): {"step_ms": [ms], "loss": [1.0]} for name, ms in step_ms.items()}
    return {"title": "W", "note": "n", "columns": columns, "products": products, "fallbacks": [], "lost_hints": {}}


PRODUCTS = st.lists(
    st.integers(1, 100).flatmap(
        lambda units: st.builds(product, POSITIVE, st.just(units), st.integers(1, units), POSITIVE, st.integers(1, 2))
    ),
    min_size=1,
    max_size=4,
)


@given(PRODUCTS, POSITIVE, POSITIVE)
def test_the_bound_is_at_least_one_and_reached_by_perfect_skipping(
    products: list[dict[str, Any]], rest: float, stock: float
) -> None:
    dense = rest + summary.phase_ms(products, DENSE)
    perfect = dense - summary.skippable_ms(products, NR_RH_ST)
    measured = workload(products, stock=stock, ours_dense=dense, nr_rh_st=perfect)
    bound = summary.bound(measured, NR_RH_ST, DENSE)
    assert bound is not None and bound >= 1.0
    assert summary.ratio(measured, NR_RH_ST, DENSE) == pytest.approx(bound)
    assert summary.ratio(measured, NR_RH_ST) == pytest.approx(summary.bound(measured, NR_RH_ST))
    # Nothing that NR+ST could skip is listed.
    assert summary.bound(measured, NR_ST, DENSE) == 1.0


@given(PRODUCTS)
def test_efficiency_is_ideal_over_measured(products: list[dict[str, Any]]) -> None:
    ideal = summary.phase_ms(products, DENSE) - summary.skippable_ms(products, NR_RH_ST)
    expected = ideal / summary.phase_ms(products, NR_RH_ST)
    assert summary.efficiency(products, NR_RH_ST) == pytest.approx(expected)
    assert summary.efficiency(products, NR_ST) is None
    perfect = [{**p, "ms": product(1.0, p["units"], p["kept"][NR_RH_ST])["ms"]} for p in products]
    assert summary.efficiency(perfect, NR_RH_ST) == pytest.approx(1.0)


@given(st.lists(POSITIVE, min_size=1, max_size=9))
def test_the_spread_lies_within_the_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)
    assert min(samples) <= spread.median <= max(samples)
    assert 0.0 <= spread.iqr <= max(samples) - min(samples) + 1e-9


def test_no_bound_without_products_or_when_they_exceed_the_step() -> None:
    assert summary.bound(workload([], stock=1.0, ours_dense=1.0), NR_RH_ST) is None
    assert summary.bound(workload([product(9.0, 4, 1)], stock=1.0, ours_dense=1.0), NR_RH_ST) is None
    assert summary.bound(workload([product(9.0, 4, 1)], stock=1.0), NR_RH_ST) is None


def test_a_column_that_skips_nothing_in_a_product_takes_what_dense_takes() -> None:
    assert summary.product_ms(product(3.0, 4, 2, count=2), "FP", NR_ST) == 6.0


def test_packing_is_charged_to_our_columns_once_and_to_no_single_phase() -> None:
    packed = {**product(1.0, 4, 2), "pack_ms": [3.0]}
    assert summary.phase_ratio([packed], DENSE) == pytest.approx(3.0 / 6.0)
    assert summary.phase_ratio([packed], STOCK) == 1.0
    assert summary.phase_ratio([packed], DENSE, ["FP"]) == 1.0


def document(scale: str, measured: dict[str, Any]) -> dict[str, Any]:
    settings = {"columns": list(COLUMNS), "threads": 1, "repeats": 1, "seed": 1}
    machine = {"cpu": "C", "cores": 2, "isa": "I"}
    return {
        "scale": scale,
        "complete": True,
        "settings": settings,
        "machine": machine,
        "date": "D",
        "git": None,
        "versions": {"torch": "1"},
        "backend": {"name": "reference", "build": {}},
        "workloads": {"w": measured},
        "sweeps": [],
    }


def test_tables_show_what_is_missing_and_say_when_it_is_no_result() -> None:
    measured = workload([product(1.0, 4, 2)], stock=10.0, ours_dense=10.0, nr_rh_st=8.5)
    full, tiny = document("full", measured), document("tiny", measured)
    steps, phases = summary.tables(full)
    assert steps.rows[0][:4] == ["W", "stock", "10.0 (0.000)", f"1.00{X}"]
    assert steps.rows[2] == ["W", "NR+ST", "-", "-", "-", "-", "-", "-"]
    assert steps.rows[3] == ["W", "NR+RH+ST", "8.50 (0.000)", *[f"1.18{X}"] * 4, "-"]
    assert phases.rows[3][-1] == "100%"
    for table in (*summary.tables(full), *summary.tables(tiny)):
        assert {len(row) for row in table.rows} == {len(table.heading)}
        assert len({line.count("|") for line in table.markdown().splitlines()}) == 1
    assert all("tiny" in row[1] for row in summary.step_table(tiny).rows)
    assert "no results" in summary.head(tiny)[0] and "no results" not in " ".join(summary.head(full))


def test_what_went_wrong_is_told() -> None:
    measured = workload([], stock=1.0)
    measured["columns"]["stock"]["loss"] = [None]
    measured["columns"]["stock"]["memory"] = {"error": "exit status -9"}
    measured["lost_hints"] = {"site": 3}
    measured["fallbacks"] = [{"operation": "gemm_fp", "backend": "cpu", "reason": "r", "calls": 2}]
    told = document("full", measured)
    told["complete"] = False
    notes = " ".join(summary.notes(told))
    assert "the loss was not finite" in notes and "3 patterns of site" in notes and "2 calls of gemm_fp" in notes
    assert "not finished" in summary.head(told)[0]
    assert summary.step_table(told).rows[0][-1] == "failed: exit status -9"
