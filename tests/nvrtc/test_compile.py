"""NVRTC compiles every kernel for every architecture, without headers, and nothing is spilled to local memory."""

from __future__ import annotations

import locale
import re
import sys
from pathlib import Path

import pytest

from sd_plugin.kernels.cuda import sources, units
from sd_plugin.kernels.cuda.driver import Unit

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cuda_resources  # type: ignore[import-not-found]

from ..more import more

UNITS = list(units.every())
#: So many units are one test: each takes half a second.
BATCH = 8


@pytest.fixture(autouse=True)
def needs_nvrtc() -> None:
    try:
        cuda_resources.nvrtc()
    except cuda_resources.CompileError as error:
        pytest.skip(str(error))


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
@pytest.mark.parametrize("first", range(0, len(UNITS), BATCH))
def test_every_kernel_compiles_and_spills_nothing(first: int, architecture: int) -> None:
    compile_and_check(UNITS[first : first + BATCH], architecture)


@pytest.mark.parametrize("architecture", [cuda_resources.ARCHITECTURES[0], *more(*cuda_resources.ARCHITECTURES[1:])])
def test_one_unit_of_every_source_compiles_and_spills_nothing(architecture: int) -> None:
    compile_and_check(list({unit.source: unit for unit in UNITS}.values()), architecture)


def compile_and_check(compiled: list[Unit], architecture: int) -> None:
    for unit in compiled:
        found, size = cuda_resources.compile_unit(unit, architecture)
        kernels = re.findall(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(", sources.read(unit.source))
        assert kernels, unit
        assert size > 0
        # Some kernels are compiled for some precisions only.
        assert set(found) <= set(kernels), unit
        assert found, unit
        for name, needs in found.items():
            assert needs.spills == 0, f"{name} of {unit} spills {needs.spills} bytes on sm_{architecture}"
            assert needs.stack == 0, f"{name} of {unit} has {needs.stack} bytes of local memory on sm_{architecture}"


def test_to_compile_leaves_the_encoding_of_text_alone() -> None:
    before = locale.nl_langinfo(locale.CODESET)
    cuda_resources.compile_unit(Unit("pattern"), cuda_resources.ARCHITECTURES[0])
    assert locale.nl_langinfo(locale.CODESET) == before


def test_a_unit_is_listed_once_and_every_source_is() -> None:
    assert len(set(UNITS)) == len(UNITS)
    assert {unit.source for unit in UNITS} == set(sources.names())


def test_a_fault_and_a_spill_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is above would fail if there were something to find."""
    monkeypatch.setattr(sources, "read", lambda name: "#error no such thing")
    with pytest.raises(cuda_resources.CompileError, match="no such thing"):
        cuda_resources.compile_unit(Unit("wrong"), 90)
    spilling = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
        float v[64];
    #pragma unroll
        for (int i = 0; i < 64; ++i) v[i] = x[i * n];
        __syncthreads();
        for (int k = 0; k < n; ++k)
    #pragma unroll
            for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + x[i + k];
    #pragma unroll
        for (int i = 0; i < 64; ++i) x[i * n] = v[i];
    }
    """
    monkeypatch.setattr(sources, "read", lambda name: spilling)
    found, _ = cuda_resources.compile_unit(Unit("spilling"), 90)
    assert found["spilling"].spills > 0
