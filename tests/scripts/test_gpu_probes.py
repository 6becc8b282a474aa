"""The kernels that ``gpu_check.py`` measures a device with, emulated: barriers are reached, gathers stay inside."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
import gpu_check_micro
import torch
from gpu_check_machine import Machine

from sd_plugin.kernels.cuda import driver

from ..emulation.emulator import EmulatedDriver

UNIT = driver.Unit("probes")
THREADS = 256
BLOCKS, ROUNDS = 5, 3

_reason = EmulatedDriver().reason_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))


def test_nothing_is_launched() -> None:
    with driver.use(EmulatedDriver()):
        driver.launch(UNIT, "noop", torch.zeros(1), 1, 32)


def test_every_block_comes_to_every_barrier_of_a_counter() -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    with driver.use(EmulatedDriver()):
        driver.launch(UNIT, "barrier_counter", counter, BLOCKS, THREADS, counter, ROUNDS, cooperative=True)
    assert counter.item() == BLOCKS * ROUNDS


@pytest.mark.parametrize(("blocks", "stride"), [(BLOCKS, 1), (BLOCKS, 8), (35, 1)])
def test_every_block_comes_to_every_barrier_of_flags(blocks: int, stride: int) -> None:
    flags = torch.zeros(blocks * stride, dtype=torch.int32)
    with driver.use(EmulatedDriver()):
        driver.launch(UNIT, "barrier_flags", flags, blocks, THREADS, flags, ROUNDS, stride, cooperative=True)
    assert flags.view(blocks, stride)[:, 0].tolist() == [ROUNDS] * blocks
    assert flags.sum() == blocks * ROUNDS


def test_gathers_stay_inside_of_the_matrix() -> None:
    """Past its end is memory that the emulation does not let a kernel read."""
    matrix, sink = torch.randn(7, 28), torch.zeros(1)
    kept = torch.tensor([0, 3, 6], dtype=torch.int32)
    with driver.use(EmulatedDriver()):
        driver.launch(UNIT, "gather_rows", matrix, 3, THREADS, matrix, kept, 3, 28, 12, 2, sink)
    assert sink.item() == 0.0


def test_the_check_measures_with_them() -> None:
    machine = Machine(torch.device("cpu"), "reference", tiny=True)
    with driver.use(EmulatedDriver()):
        assert gpu_check_micro.launches(machine)["ours_host_us"] > 0
        (barrier,) = gpu_check_micro.barriers(machine).values()
        assert set(barrier) == {"counter_us", "flags_us", "flags_apart_us"} and min(barrier.values()) > 0
        gathered = gpu_check_micro.gathers(machine)
    assert set(gathered) == {"tiny, p=0", "tiny, p=0.5"}
    assert all(found["us_per_pass"] > 0 for found in gathered.values())
