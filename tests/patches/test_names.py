"""Names that modules have taken from a host are given another value, and back, without running code of a module."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_plugin.patches import _names

NAME = "a_module_of_the_test_of_names"


@pytest.fixture(autouse=True)
def module() -> Iterator[ModuleType]:
    module = sys.modules[NAME] = ModuleType(NAME)
    yield module
    sys.modules.pop(NAME, None)


class Unequal:
    """Compared with nothing: its identity is all that counts."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")


# Every example looks through all loaded modules.
@settings(max_examples=20)
@given(names=st.dictionaries(st.text(min_size=1), st.integers(0, 4)))
def test_what_is_the_object_is_replaced_and_nothing_else(names: dict[str, int]) -> None:
    objects, others = [Unequal() for _ in range(5)], [Unequal() for _ in range(2)]
    module = sys.modules[NAME] = ModuleType(NAME)
    vars(module).update({name: objects[which] for name, which in names.items()})
    before = dict(vars(module))
    _names.rebind(zip(objects, others, strict=False))
    expected = [*others, *objects[2:]]
    assert all(vars(module)[name] is expected[which] for name, which in names.items())
    _names.rebind(zip(others, objects, strict=False))
    assert vars(module).keys() == before.keys()
    assert all(value is vars(module)[name] for name, value in before.items())


def test_modules_of_this_library_keep_what_they_have() -> None:
    old = object()
    own = sys.modules["sd_plugin.a_module_of_the_test"] = ModuleType("own")
    own.value = old  # type: ignore[attr-defined]
    try:
        _names.rebind([(old, object())])
        assert own.value is old  # type: ignore[attr-defined]
    finally:
        del sys.modules["sd_plugin.a_module_of_the_test"]


def test_a_module_that_is_loaded_on_demand_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text("raise AssertionError('loaded')")
    spec = importlib.util.spec_from_file_location(NAME, tmp_path / "lazy.py")
    assert spec is not None and spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    _names.rebind([(object(), object())])
    with pytest.raises(AssertionError, match="loaded"):
        module.value  # noqa: B018 - it is loaded now


class Hostile:
    """Stands in ``sys.modules``, and fails whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"it was asked for {name}")


class Watched(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"it was asked for {name}")


@pytest.mark.parametrize("make", [Hostile, lambda: Watched("watched"), lambda: None, lambda: 3])
def test_whatever_stands_there_is_not_asked(make: Callable[[], Any]) -> None:
    sys.modules[NAME] = make()
    try:
        _names.rebind([(object(), object())])
    finally:
        del sys.modules[NAME]


def test_modules_may_change_meanwhile(module: ModuleType) -> None:
    old, new, done = object(), object(), threading.Event()

    def import_things() -> None:
        number = 0
        while not done.is_set():
            number = (number + 1) % 500
            vars(module)[f"name{number}"] = old
            sys.modules[f"{NAME}.{number}"] = ModuleType("child")
            vars(module).pop(f"name{(number + 250) % 500}", None)
            sys.modules.pop(f"{NAME}.{(number + 250) % 500}", None)

    thread = threading.Thread(target=import_things)
    thread.start()
    try:
        for _ in range(10):
            _names.rebind([(old, new)])
    finally:
        done.set()
        thread.join()
        for name in [name for name in sys.modules if name.startswith(f"{NAME}.")]:
            del sys.modules[name]
    _names.rebind([(old, new)])
    assert old not in vars(module).values()
