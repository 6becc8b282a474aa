"""Compiling and launching kernels: CuPy on NVIDIA GPUs, behind an interface that tests can stand in for."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import torch

from ..storage import address
from . import sources, thread_locale

if TYPE_CHECKING:
    from torch import Tensor

    Argument = Tensor | None | int | float

#: The first architecture with what the sources use: asynchronous copies, and tensor cores that take TF32 and bfloat16.
LEAST_CAPABILITY = (8, 0)
OPTIONS = ("--std=c++17",)
#: Shared memory that a block may use without asking for more.
_PLAIN_SHARED = 48 * 1024
_MAX_SHARED_OPTIN = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Unit(NamedTuple):
    """A translation unit: a source of ``src/`` with the constants it is compiled for."""

    source: str
    defines: tuple[tuple[str, int], ...] = ()

    def options(self) -> tuple[str, ...]:
        """Options for the compiler."""
        return (*OPTIONS, *(f"-D{name}={value}" for name, value in self.defines))


class Properties(NamedTuple):
    """What a device allows."""

    name: str
    multiprocessors: int
    shared_memory: int  #: bytes that one block may use at most
    capability: tuple[int, int]


class Driver(Protocol):
    """Compiles and launches."""

    device_type: str  #: of the tensors it takes

    def reason_unavailable(self) -> str | None:
        """Why it cannot launch anything on this machine; None when it can."""

    def properties(self, device: torch.device) -> Properties:
        """What ``device`` allows."""

    def launch(
        self,
        unit: Unit,
        function: str,
        device: torch.device,
        grid: int,
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
        cooperative: bool,
    ) -> None:
        """Run ``function`` of ``unit`` with ``grid`` blocks, all at once if ``cooperative``."""


class CuPyDriver:
    """CuPy's NVRTC, with its cache on disk, and the CUDA driver; PyTorch's current stream at every call."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._functions: dict[tuple[Unit, str, int], _Function] = {}

    def reason_unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        try:
            import cupy  # noqa: F401
        except Exception as error:  # a CuPy for another CUDA fails in many ways
            extra = "cuda12" if (torch.version.cuda or "").startswith("12") else "cuda13"
            return f"CuPy cannot be imported ({error}); pip install 'sd-plugin[{extra}]'"
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(index) < LEAST_CAPABILITY:
                name = torch.cuda.get_device_name(index)
                return f"{name} is older than compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
        try:
            self._function(Unit("pattern"), "order_kept", torch.cuda.current_device())
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"CuPy cannot compile ({lines[0]})"
        return None

    @cache  # noqa: B019 - one driver lives as long as the process
    def properties(self, device: torch.device) -> Properties:
        from cupy.cuda import runtime

        index = _index(device)
        of_torch = torch.cuda.get_device_properties(index)
        shared = runtime.deviceGetAttribute(_MAX_SHARED_OPTIN, index)
        capability = torch.cuda.get_device_capability(index)
        return Properties(of_torch.name, of_torch.multi_processor_count, shared, capability)

    def launch(
        self,
        unit: Unit,
        function: str,
        device: torch.device,
        grid: int,
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
        cooperative: bool,
    ) -> None:
        index = _index(device)
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._launch(unit, function, index, grid, threads, shared, arguments, cooperative)
        else:
            self._launch(unit, function, index, grid, threads, shared, arguments, cooperative)

    def _launch(
        self,
        unit: Unit,
        name: str,
        index: int,
        grid: int,
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
        cooperative: bool,
    ) -> None:
        from cupy.cuda import driver as api

        _ensure_context(index)
        function = self._functions.get((unit, name, index)) or self._function(unit, name, index)
        function.allow_shared(shared)
        stream = torch._C._cuda_getCurrentRawStream(index)
        parameters = _PARAMETERS.address(arguments)
        if cooperative:
            api.launchCooperativeKernel(function.pointer, grid, 1, 1, threads, 1, 1, shared, stream, parameters)
        else:
            api.launchKernel(function.pointer, grid, 1, 1, threads, 1, 1, shared, stream, parameters, 0)

    def _function(self, unit: Unit, name: str, index: int) -> _Function:
        """Compiled, or read from CuPy's cache, at first use on each device."""
        _ensure_context(index)
        with thread_locale.kept():
            function = _Function(_module(unit).get_function(name))
        self._functions[unit, name, index] = function
        return function


def _ensure_context(index: int) -> None:
    """A thread that autograd has started may not have a context yet: to be on device 0 is nothing it had to ask for."""
    from cupy.cuda import driver as api
    from cupy.cuda import runtime

    if not api.ctxGetCurrent():
        runtime.setDevice(index)
        if not api.ctxGetCurrent():  # CUDA < 12 waits for a call that needs one
            runtime.free(0)


@cache
def _module(unit: Unit) -> Any:
    import cupy

    return cupy.RawModule(code=sources.read(unit.source), options=unit.options(), backend="nvrtc")


class _Function:
    """A kernel on the current device, and how much shared memory it has been granted."""

    def __init__(self, kernel: Any) -> None:
        self._loaded = kernel.kernel  # keeps the module loaded
        self.pointer: int = self._loaded.ptr
        self._granted = _PLAIN_SHARED

    def allow_shared(self, size: int) -> None:
        """Let blocks use ``size`` bytes."""
        if size > self._granted:
            from cupy.cuda import driver as api

            api.funcSetAttribute(self.pointer, _MAX_DYNAMIC_SHARED, size)
            self._granted = size


class _Parameters(threading.local):
    """Memory that kernel parameters are laid out in: one for each thread, since a launch copies them at once.

    Every parameter has eight bytes, of which the kernel reads as many as its type has.
    """

    ROOM = 64

    def __init__(self) -> None:
        self._values = ctypes.create_string_buffer(8 * self.ROOM)
        start = ctypes.addressof(self._values)
        self._addresses = (ctypes.c_void_p * self.ROOM)(*(start + 8 * i for i in range(self.ROOM)))
        self._address = ctypes.addressof(self._addresses)

    def address(self, arguments: Sequence[Argument]) -> int:
        """Address of the addresses of ``arguments``."""
        # Every launch comes through here: by type, since asking isinstance of each argument took half of its time.
        kinds, values = [], []
        for argument in arguments:
            kind = type(argument)
            if kind is int or kind is bool:
                kinds.append("i4x")
                values.append(argument)
            elif kind is float:
                kinds.append("f4x")
                values.append(argument)
            elif argument is None:
                kinds.append("Q")
                values.append(0)
            else:
                kinds.append("Q")
                tensor = cast("Tensor", argument)
                values.append(tensor.data_ptr() or address(tensor))
        _packer("".join(kinds)).pack_into(self._values, 0, *values)
        return self._address


@cache
def _packer(kinds: str) -> struct.Struct:
    return struct.Struct("<" + kinds)


_PARAMETERS = _Parameters()


def _index(device: torch.device) -> int:
    # torch's annotation leaves None out.
    return torch.cuda.current_device() if device.index is None else device.index  # type: ignore[redundant-expr]


_D = TypeVar("_D", bound=Driver)
_drivers: list[Driver] = [CuPyDriver()]


def driver() -> Driver:
    """The one in use."""
    return _drivers[-1]


@contextmanager
def use(other: _D) -> Iterator[_D]:
    """Put ``other`` in its place for a while; for tests."""
    _drivers.append(other)
    try:
        yield other
    finally:
        _drivers.remove(other)


def launch(
    unit: Unit,
    function: str,
    like: Tensor,
    grid: int,
    threads: int,
    *arguments: Argument,
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    """Run a kernel on the device of ``like``, on PyTorch's current stream.

    Args:
        grid: blocks; none launches nothing.
        arguments: of the kernel, in order: an int is a C ``int``, a float a C ``float``, None a null pointer.
        shared: bytes of shared memory of each block.
        cooperative: all blocks run at the same time, so that they may wait for each other.

    Raises:
        struct.error: an int does not fit.
    """
    if grid > 0:
        driver().launch(unit, function, like.device, grid, threads, shared, arguments, cooperative)
