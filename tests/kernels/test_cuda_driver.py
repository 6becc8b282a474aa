"""The driver of the CUDA backend against a stand-in for CuPy and torch.cuda: what is compiled, launched and told."""

from __future__ import annotations

import ctypes
import importlib.util
import locale
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sd_plugin.kernels import BACKENDS, dispatch
from sd_plugin.kernels.cuda import driver, sources
from sd_plugin.kernels.cuda.driver import CuPyDriver, Properties, Unit


@dataclass
class FakeGPU:
    """Two devices, and what was asked of them."""

    capability: tuple[int, int] = (9, 0)
    current: int = 0
    compiled: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    functions: list[tuple[str, int]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    granted: dict[tuple[str, int], int] = field(default_factory=dict)
    fault: Exception | None = None
    context: int = 1
    context_after: str = "setDevice"  #: which call makes one

    def grant(self, function: int, attribute: int, size: int) -> None:
        assert attribute == 8
        self.granted[self.functions[function]] = size

    def set_device(self, index: int) -> None:
        self.current = index
        self.context = int(self.context_after == "setDevice")

    def free(self, pointer: int) -> None:
        assert pointer == 0
        self.context = 1

    def module(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        assert backend == "nvrtc"
        self.compiled.append((code, options))
        return SimpleNamespace(get_function=lambda name: _Kernel(self, name))

    def launch(self, cooperative: bool, function: int, *rest: int) -> None:
        assert self.context, "CUDA_ERROR_INVALID_CONTEXT"
        grid, _, _, threads, _, _, shared, stream, parameters = rest[:9]
        name, index = self.functions[function]
        values = []
        for i in range(3):
            at = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[i]
            values.append(ctypes.string_at(at, 8))
        self.launches.append(
            {
                "name": name,
                "device": index,
                "grid": grid,
                "threads": threads,
                "shared": shared,
                "stream": stream,
                "cooperative": cooperative,
                "values": values,
                "current": self.current,
            }
        )


class _Kernel:
    """A ``cupy.RawKernel``: its function is that of the device that is current when it is asked for."""

    def __init__(self, gpu: FakeGPU, name: str) -> None:
        self._gpu, self._name = gpu, name

    @property
    def kernel(self) -> Any:
        if self._gpu.fault is not None:
            raise self._gpu.fault
        self._gpu.functions.append((self._name, self._gpu.current))
        return SimpleNamespace(ptr=len(self._gpu.functions) - 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    fake = FakeGPU()

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, fake.current = fake.current, index
        yield
        fake.current = before

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: fake.current,
        "device": device,
        "get_device_capability": lambda index: fake.capability,
        "get_device_name": lambda index: "Fake 100",
        "get_device_properties": lambda index: SimpleNamespace(name="Fake 100", multi_processor_count=132),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.RawModule = lambda *, code, options, backend: fake.module(code, options, backend)
    cuda.driver = SimpleNamespace(
        launchKernel=lambda *args: fake.launch(False, *args),
        launchCooperativeKernel=lambda *args: fake.launch(True, *args),
        ctxGetCurrent=lambda: fake.context,
        funcSetAttribute=fake.grant,
    )
    cuda.runtime = SimpleNamespace(
        deviceGetAttribute=lambda attribute, index: {97: 232448}[attribute],
        setDevice=fake.set_device,
        free=fake.free,
    )
    cupy.cuda = cuda
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    driver._module.cache_clear()
    yield fake
    driver._module.cache_clear()


def launched(cuda: CuPyDriver, index: int | None, *arguments: Any, shared: int = 0, cooperative: bool = False) -> None:
    device = torch.device("cuda") if index is None else torch.device("cuda", index)
    cuda.launch(Unit("cell", (("SD_PRECISION", 0),)), "cell_forward", device, 5, 256, shared, arguments, cooperative)


def test_a_launch_passes_what_the_kernel_reads(gpu: FakeGPU) -> None:
    cuda, tensor = CuPyDriver(), torch.zeros(3)
    launched(cuda, 0, tensor, -7, 2.5)
    launched(cuda, 0, None, True, -0.0, cooperative=True)
    first, second = gpu.launches
    told = {name: first[name] for name in ("name", "grid", "threads", "shared", "stream", "cooperative")}
    assert told == {
        "name": "cell_forward", "grid": 5, "threads": 256, "shared": 0, "stream": 1000, "cooperative": False,
    }  # fmt: skip
    pointer, integer, real = first["values"]
    assert int.from_bytes(pointer, "little") == tensor.data_ptr()
    assert ctypes.c_int.from_buffer_copy(integer[:4]).value == -7
    assert ctypes.c_float.from_buffer_copy(real[:4]).value == 2.5
    assert second["cooperative"]
    assert int.from_bytes(second["values"][0], "little") == 0
    assert ctypes.c_int.from_buffer_copy(second["values"][1][:4]).value == 1


def test_a_unit_is_compiled_once_and_loaded_once_for_each_device(gpu: FakeGPU) -> None:
    cuda = CuPyDriver()
    for index in (0, 1, 0, 1, None):
        launched(cuda, index)
    assert gpu.compiled == [(sources.read("cell"), ("--std=c++17", "-DSD_PRECISION=0"))]
    assert gpu.functions == [("cell_forward", 0), ("cell_forward", 1)]
    assert [(one["device"], one["current"], one["stream"]) for one in gpu.launches] == [
        (0, 0, 1000), (1, 1, 1001), (0, 0, 1000), (1, 1, 1001), (0, 0, 1000),
    ]  # fmt: skip
    assert gpu.current == 0


def test_more_shared_memory_is_asked_for_on_each_device(gpu: FakeGPU) -> None:
    cuda = CuPyDriver()
    for index, shared in ((0, 1000), (0, 100_000), (0, 60_000), (1, 200_000)):
        launched(cuda, index, shared=shared)
    assert gpu.granted == {("cell_forward", 0): 100_000, ("cell_forward", 1): 200_000}


@pytest.mark.parametrize("call", ["setDevice", "free"])
def test_a_thread_without_a_context_gets_one(gpu: FakeGPU, call: str) -> None:
    """As the one in which autograd runs the backward pass."""
    cuda = CuPyDriver()
    gpu.context, gpu.context_after = 0, call
    launched(cuda, 0)
    gpu.context = 0
    launched(cuda, 0)
    assert len(gpu.launches) == 2


def test_properties(gpu: FakeGPU) -> None:
    assert CuPyDriver().properties(torch.device("cuda", 1)) == Properties("Fake 100", 132, 232448, (9, 0))


def test_no_blocks_are_no_launch(gpu: FakeGPU) -> None:
    driver.launch(Unit("cell"), "cell_forward", torch.zeros(1), 0, 256)
    assert not gpu.launches


def test_an_int_that_does_not_fit_is_an_error(gpu: FakeGPU) -> None:
    with pytest.raises(Exception, match="format requires"):
        launched(CuPyDriver(), 0, 2**31)


def test_available_where_a_kernel_can_be_compiled(gpu: FakeGPU) -> None:
    assert CuPyDriver().reason_unavailable() is None
    assert gpu.functions == [("order_kept", 0)]


def test_an_old_gpu_is_named(gpu: FakeGPU) -> None:
    gpu.capability = (7, 0)
    assert CuPyDriver().reason_unavailable() == "Fake 100 is older than compute capability 8.0"


def test_a_compiler_that_fails_is_quoted_in_one_line(gpu: FakeGPU) -> None:
    gpu.fault = RuntimeError("libnvrtc.so is missing\nand more")
    assert CuPyDriver().reason_unavailable() == "CuPy cannot compile (libnvrtc.so is missing)"


@pytest.mark.parametrize(("version", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13")])
def test_a_missing_cupy_is_told_with_the_command(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, version: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert f"pip install 'sd-plugin[{extra}]'" in str(CuPyDriver().reason_unavailable())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dispatcher_says_why_and_nothing_is_imported() -> None:
    program = "import sys; from sd_plugin import kernels; print(kernels.status()['cuda'], 'cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "torch finds no CUDA device False"


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_what_is_used_of_cupy_is_there() -> None:
    """A release of CuPy may move what is not in its manual."""
    import cupy

    assert callable(cupy.cuda.driver.launchKernel)
    assert callable(cupy.cuda.driver.launchCooperativeKernel)
    assert callable(cupy.cuda.driver.ctxGetCurrent)
    assert callable(cupy.cuda.driver.funcSetAttribute)
    for name in ("deviceGetAttribute", "setDevice", "free"):
        assert callable(getattr(cupy.cuda.runtime, name))
    kernel = cupy.RawModule(code=sources.read("cell"), options=Unit("cell").options(), backend="nvrtc")
    assert hasattr(type(kernel), "get_function")


def test_a_compiler_that_changes_the_locale_leaves_the_encoding_of_text_alone(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NVRTC 12.1 does."""
    libc = ctypes.CDLL(None)
    libc.newlocale.restype = libc.uselocale.restype = ctypes.c_void_p
    libc.newlocale.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
    libc.uselocale.argtypes = [ctypes.c_void_p]
    before = libc.uselocale(None)
    every_category = (1 << locale.LC_CTYPE) | (1 << locale.LC_NUMERIC)
    other = libc.newlocale(every_category, b"C", None)
    module = gpu.module

    def compiled(*told: object) -> object:
        libc.uselocale(other)
        return module(*told)

    monkeypatch.setattr(gpu, "module", compiled)
    try:
        assert CuPyDriver().reason_unavailable() is None
        assert libc.uselocale(None) == before
    finally:
        libc.uselocale(before)


def test_status_asks_the_driver(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.capability = (7, 5)
    dispatch._load.cache_clear()
    try:
        assert dispatch.status()["cuda"] == "Fake 100 is older than compute capability 8.0"
        assert BACKENDS["cuda"] == "cuda"
    finally:
        dispatch._load.cache_clear()
