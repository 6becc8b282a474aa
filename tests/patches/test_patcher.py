"""Changes to a host are put back exactly, whatever kind of attribute they replaced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_plugin.patches._patcher import Patcher


def fresh() -> type:
    class Base:
        inherited = 1

    class Host(Base):
        value = 2

        @staticmethod
        def static() -> str:
            return "static"

        @classmethod
        def made(cls) -> str:
            return cls.__name__

    return Host


names = st.sampled_from(["value", "inherited", "new", "static", "made"])


@given(changes=st.lists(st.tuples(names, st.integers()), max_size=8))
def test_undo_restores_a_class(changes: list[tuple[str, int]]) -> None:
    host = fresh()
    before = dict(vars(host))
    patcher = Patcher()
    for name, value in changes:
        patcher.set(host, name, value)
        assert getattr(host, name) == value
    assert bool(patcher) is bool(changes)
    patcher.undo()
    assert dict(vars(host)) == before
    assert host.inherited == 1
    assert host.static() == "static"
    assert host().made() == "Host"
    assert not patcher


@pytest.mark.parametrize("first", [0, 1])
def test_two_patches_may_be_undone_in_any_order(first: int) -> None:
    class Host:
        def value(self) -> int:
            return 0

    before, patchers = Host.value, [Patcher(), Patcher()]
    for patcher in patchers:
        patcher.set(Host, "value", lambda self, stock=Host.value: stock(self) + 1)
    assert Host().value() == 2
    patchers[first].undo()
    patchers[1 - first].undo()
    assert Host.value is before


def test_what_has_changed_since_stays() -> None:
    host, patcher = fresh(), Patcher()
    patcher.set(host, "value", 3)
    host.value = 4
    patcher.undo()
    assert host.value == 4


@given(
    start=st.dictionaries(st.sampled_from("abc"), st.integers()),
    changes=st.lists(st.tuples(st.sampled_from("abcde"), st.integers()), max_size=8),
)
def test_undo_restores_a_mapping(start: dict[str, int], changes: list[tuple[str, int]]) -> None:
    mapping = dict(start)
    patcher = Patcher()
    for key, value in changes:
        patcher.set_item(mapping, key, value)
    assert mapping == {**start, **dict(changes)}
    patcher.undo()
    assert mapping == start
