"""Tensors in recycled memory: pages that a process has touched before cost nothing, fresh ones more than the sums.

A block returns to the pool when the last tensor in it dies, whoever held it (autograd, an optimizer, the user).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections import OrderedDict, deque
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: Smaller tensors are left to torch's own allocator, which recycles them well.
SMALLEST = 1 << 20
#: Idle memory is given back to the system beyond this many bytes.
MOST_IDLE = 1 << 29
#: A block may be this many times as large as what is put there.
MOST_WASTE = 3
_HUGE = 1 << 21


def _rounded(size: int) -> int:
    """Sizes in steps of an eighth of a power of two, so that sequences of about one length share blocks."""
    step = max(1 << max(size.bit_length() - 4, 0), _HUGE if size > 4 * _HUGE else mmap.PAGESIZE)
    return (size + step - 1) // step * step


class Pool:
    """Idle blocks by size, the longest idle first.

    A finalizer, which the garbage collector may run in the middle of any line, of the same thread too, only appends
    to a queue; and whoever finds the pool in use allocates anew instead of waiting.
    """

    def __init__(self, most_idle: int = MOST_IDLE) -> None:
        self._most_idle = most_idle
        self._returned: deque[mmap.mmap] = deque()
        self._idle: OrderedDict[int, list[mmap.mmap]] = OrderedDict()
        self._idle_bytes = 0
        self._lock = Lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    @property
    def idle_bytes(self) -> int:
        """Memory that is held for reuse."""
        return self._idle_bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``torch.empty`` on the CPU; of 1 MiB and more it cannot be resized."""
        count = prod(shape)
        size = count * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype)
        block = self._take(_rounded(size))
        # A view of the block's memory whose death tells that no tensor uses it any more.
        view = (ctypes.c_char * len(block)).from_buffer(block)
        weakref.finalize(view, self._give, block).atexit = False
        memory = torch.frombuffer(view, dtype=dtype, count=count)
        # Not a view of it: views of the result must lead back to the result itself (`_base`).
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, tuple(shape), strides)

    def _take(self, size: int) -> mmap.mmap:
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
                fitting = [idle for idle in self._idle if size <= idle <= size * MOST_WASTE]
                if fitting:
                    return self._pop(min(fitting), -1)
            finally:
                self._lock.release()
        return _mapped(size)

    def _give(self, block: mmap.mmap) -> None:
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        """Sort in what has been returned, and let go of what has been idle longest beyond the limit."""
        while self._returned:
            block = self._returned.popleft()
            self._idle.setdefault(len(block), []).append(block)
            self._idle.move_to_end(len(block))
            self._idle_bytes += len(block)
        while self._idle_bytes > self._most_idle:
            self._pop(next(iter(self._idle)), 0)

    def _pop(self, size: int, which: int) -> mmap.mmap:
        block = self._idle[size].pop(which)
        self._idle_bytes -= size
        if not self._idle[size]:
            del self._idle[size]
        return block

    def _renew_lock(self) -> None:
        # Another thread of the parent may have held it.
        self._lock = Lock()


def _mapped(size: int) -> mmap.mmap:
    """Fresh memory of the system, in huge pages where it has them."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE:
        # Not every kernel has huge pages; they are only faster.
        with contextlib.suppress(OSError, AttributeError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


#: Of this process.
POOL = Pool()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, of recycled memory."""
    return POOL.empty(shape, dtype)
