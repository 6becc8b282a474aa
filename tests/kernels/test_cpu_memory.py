"""Recycled memory: what is given back, when, and that finalizers may run anywhere."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from sd_plugin.kernels.cpu import memory
from sd_plugin.kernels.cpu.memory import Pool

MIB = 1 << 20


def test_memory_returns_with_the_last_tensor_in_it() -> None:
    pool = Pool()
    tensor = pool.empty((2, MIB), torch.float32)
    view, address = tensor[1, 5:], tensor.data_ptr()
    assert view._base is tensor and tensor._base is None
    del tensor
    assert pool.idle_bytes == 0
    del view
    assert pool.idle_bytes >= 8 * MIB
    assert pool.empty((MIB, 2), torch.float32).data_ptr() == address


def test_small_tensors_are_torchs_own() -> None:
    pool = Pool()
    del (tensor := {0: pool.empty((10,), torch.float32)})[0]
    assert not tensor
    assert pool.idle_bytes == 0


def test_a_block_is_not_given_to_what_would_waste_it() -> None:
    pool = Pool()
    big = pool.empty((16 * MIB,), torch.uint8)
    address = big.data_ptr()
    del big
    small = pool.empty((2 * MIB,), torch.uint8)
    assert small.data_ptr() != address
    fair = pool.empty((10 * MIB,), torch.uint8)
    assert fair.data_ptr() == address


def test_idle_memory_is_limited() -> None:
    pool = Pool(most_idle=10 * MIB)
    tensors = [pool.empty((4 * MIB,), torch.uint8) for _ in range(5)]
    del tensors
    assert 0 < pool.idle_bytes <= 10 * MIB


def test_tensors_of_the_pool_are_ordinary() -> None:
    tensor = Pool().empty((3, MIB), torch.float64)
    assert tensor.is_contiguous() and tensor.dtype == torch.float64
    tensor.fill_(2.0).requires_grad_()
    (tensor * tensor).sum().backward()
    assert bool((tensor.grad == 4).all())


def test_finalizers_may_run_in_the_middle_of_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the garbage collector runs them from Python 3.12 on: between any two lines."""
    pool = Pool()
    pending = [pool.empty((size * MIB,), torch.uint8) for size in range(1, 5)]

    class Interrupted(type(pool._idle)):  # type: ignore[misc]
        def __iter__(self):  # type: ignore[no-untyped-def]
            for key in super().__iter__():
                if pending:
                    pending.pop()
                yield key

    del [pool.empty((3 * MIB,), torch.uint8)][0]
    monkeypatch.setattr(pool, "_idle", Interrupted(pool._idle))
    for _ in range(6):
        pool.empty((6 * MIB,), torch.uint8)
    gc.collect()
    assert not pending
    pool.empty((1 * MIB,), torch.uint8)
    assert pool.idle_bytes == sum(size * len(blocks) for size, blocks in pool._idle.items())


def test_threads_share_a_pool() -> None:
    pool = Pool()
    failures: list[BaseException] = []

    def work(value: int) -> None:
        try:
            for _ in range(50):
                tensor = pool.empty((MIB,), torch.uint8).fill_(value)
                assert bool((tensor == value).all())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_backends_results_come_from_the_pool() -> None:
    before = memory.POOL.idle_bytes
    del (tensor := [memory.empty(5, MIB, dtype=torch.float32)])[0]
    assert not tensor
    assert memory.POOL.idle_bytes != before or before >= memory.MOST_IDLE - 20 * MIB
