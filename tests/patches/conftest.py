"""Fixtures of the patches' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sd_plugin
from sd_plugin import stats


@pytest.fixture
def unpatched() -> Iterator[None]:
    """The test starts with torch unpatched and nothing counted, and leaves torch so."""
    stats.reset()
    torch.manual_seed(5)
    yield
    sd_plugin.disable("torch_nn")
    stats.reset()
