"""Fixtures of the patches' tests."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

import sd_plugin
from sd_plugin import stats
from sd_plugin.patches.torch_nn._living import LivingLSTMs


@pytest.fixture(autouse=True, scope="module")
def lstms_of_other_tests_do_not_count() -> Iterator[None]:
    """Caches and reports of failures keep some alive, which would have a say in what an activation's dimensions are."""
    gc.collect()
    left = [weakref.ref(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.nn.LSTM)]
    find = LivingLSTMs.find

    def find_others(self: LivingLSTMs) -> None:
        find(self)
        for reference in left:
            self._known.pop(id(reference()), None)
        self._layouts = {}

    LivingLSTMs.find = find_others  # type: ignore[method-assign]
    yield
    LivingLSTMs.find = find  # type: ignore[method-assign]


@pytest.fixture
def unpatched() -> Iterator[None]:
    """The test starts with torch unpatched and nothing counted, and leaves torch so."""
    stats.reset()
    torch.manual_seed(5)
    yield
    sd_plugin.disable("torch_nn")
    stats.reset()
