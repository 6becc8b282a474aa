"""The backends that the kernel tests run on: every one that is available here, and the CUDA kernels emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from sd_plugin.kernels import BACKENDS, BackendError, choose, dispatch, status
from sd_plugin.kernels.cuda import driver

from ..emulation.emulator import EmulatedDriver

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


#: The CUDA backend on CPU tensors, its kernels run by an emulation.
EMULATED = "cuda-emulated"


@contextmanager
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    """Within, the backend ``cuda`` takes CPU tensors."""
    monkeypatch.setitem(BACKENDS, "cuda", "cpu")
    with driver.use(EmulatedDriver()) as emulated:
        # Whether a backend is available is asked once per process.
        dispatch._load.cache_clear()
        yield emulated
    dispatch._load.cache_clear()


@pytest.fixture(params=[*(name for name, reason in status().items() if reason is None), EMULATED])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, forced for the duration of the test."""
    name = request.param
    # Tests of float32 expect its precision; that of TF32 has tests of its own.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if name != EMULATED:
        monkeypatch.setenv("SD_PLUGIN_BACKEND", name)
        yield name
        return
    with emulated_cuda(monkeypatch):
        monkeypatch.setenv("SD_PLUGIN_BACKEND", "cuda")
        yield "cuda"


@pytest.fixture
def device(backend: str) -> str:
    """The device type whose tensors ``backend`` takes."""
    return BACKENDS[backend] or "cpu"


@pytest.fixture
def dtypes_of(backend: str, device: str) -> Callable[[str], list[torch.dtype]]:
    """The dtypes in which ``backend`` does an operation."""

    def supported(operation: str) -> list[torch.dtype]:
        found = []
        for dtype in DTYPES:
            try:
                choose(operation, torch.device(device), dtype)
            except BackendError:
                continue
            found.append(dtype)
        assert found, f"{backend} does {operation} in no dtype"
        return found

    return supported
