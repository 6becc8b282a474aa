"""The backends that the kernel tests run on: every one that is available here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sd_plugin.kernels import BACKENDS, BackendError, choose, status

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[name for name, reason in status().items() if reason is None])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend, forced for the duration of the test."""
    monkeypatch.setenv("SD_PLUGIN_BACKEND", request.param)
    return request.param


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
