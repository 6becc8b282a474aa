"""A program that has imported torch's functions by name, before the patch or while it is on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

import sd_plugin
from sd_plugin import hints, stats
from sd_plugin.patches._patcher import Patcher

pytestmark = pytest.mark.usefixtures("unpatched")

IMPORTS = """
from torch import addmm
from torch.jit import script
from torch.nn.utils.rnn import pack_padded_sequence as pack
"""
NAME = "a_program_of_the_test"


def stock() -> dict[str, object]:
    """What torch has now, by the names of the program."""
    return {"addmm": torch.addmm, "script": torch.jit.script, "pack": nn.utils.rnn.pack_padded_sequence}


def program() -> ModuleType:
    """A loaded module that has torch's functions by name."""
    module = sys.modules[NAME] = ModuleType(NAME)
    exec(IMPORTS, vars(module))
    return module


@pytest.fixture(autouse=True)
def without_program() -> Iterator[None]:
    yield
    sys.modules.pop(NAME, None)


def taken(module: ModuleType, values: dict[str, object]) -> bool:
    return all(vars(module)[name] is value for name, value in values.items())


@pytest.mark.parametrize("imported", ["before", "after"])
def test_names_are_replaced_and_put_back(imported: str) -> None:
    before = stock()
    module = program() if imported == "before" else None
    sd_plugin.enable("torch_nn")
    assert not any(now is before[name] for name, now in stock().items())
    module = module or program()
    assert taken(module, stock())
    sd_plugin.enable("torch_nn", mode="nr_st")
    assert taken(module, stock())
    sd_plugin.disable("torch_nn")
    assert taken(module, before) and stock() == before


def test_torchs_own_modules_script_with_the_replacement() -> None:
    before = torch.jit._script.script
    sd_plugin.enable("torch_nn")
    assert torch.jit._script.script is torch.jit._trace.script is torch.jit.script is not before
    sd_plugin.disable("torch_nn")
    assert torch.jit._script.script is torch.jit._trace.script is torch.jit.script is before


def test_a_name_that_was_given_another_value_keeps_it() -> None:
    module = program()
    sd_plugin.enable("torch_nn")
    module.pack = own = lambda *_: None  # type: ignore[attr-defined]
    sd_plugin.disable("torch_nn")
    assert module.pack is own  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["this", "the other"])
def test_another_patch_above_may_be_undone_first_or_last(first: str) -> None:
    before, module = stock(), program()
    sd_plugin.enable("torch_nn")
    other = Patcher()
    ours = torch.addmm
    other.set(torch, "addmm", lambda *arguments: ours(*arguments))
    undo = [lambda: sd_plugin.disable("torch_nn"), other.undo]
    for step in undo if first == "this" else reversed(undo):
        step()
    assert stock() == before and taken(module, before)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_hint_survives_packing_by_an_imported_name(batch_first: bool) -> None:
    """NCRFpp and many others: without it the recurrent dropout was lost too."""
    module, lstm = program(), nn.LSTM(16, 8, batch_first=batch_first, bidirectional=True)
    sd_plugin.enable("torch_nn")
    x = nn.Dropout(0.5)(torch.randn((3, 5, 16) if batch_first else (5, 3, 16)))
    packed = vars(module)["pack"](x, torch.tensor([5, 4, 2]), batch_first)
    assert hints.lookup(packed.data) is not None
    lstm(packed)[0].data.sum().backward()
    assert set(stats.sites()) == {"dropout 16", "lstm 16x8.l0.recurrent", "lstm 16x8.l0_reverse.recurrent"}
    assert not any(site.lost for site in stats.sites().values())


def test_a_projection_by_an_imported_name_skips() -> None:
    module, lstm = program(), nn.LSTM(16, 16)
    sd_plugin.enable("torch_nn")
    x = nn.Dropout(0.5)(torch.randn(4, 3, 16)).view(-1, 16)
    vars(module)["addmm"](torch.zeros(5), x, torch.randn(16, 5))
    assert stats.sites()["dropout 16"].skipped > 0
    del lstm
