"""A small AWD-LSTM learns with structured dropout what it learns with its own: the same where nothing is dropped, and
as well where units are. On the stand-in for fastai; fastai itself trains in tests/hosts/test_fastai_host.py.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sd_plugin
from sd_plugin import stats

from .. import counted
from ..tolerances import of_training

pytestmark = pytest.mark.convergence

STANDINS = Path(__file__).parents[1] / "patches" / "standins"
SYMBOLS, STEPS, BATCH, HIDDEN, UPDATES = 10, 12, 16, 40, 250
#: Of the symbol that is likely after the one before; any other comes as often as the rest.
LIKELY = 0.85
ENTROPY = -LIKELY * math.log(LIKELY) - (1 - LIKELY) * math.log((1 - LIKELY) / (SYMBOLS - 1))
#: A held-out loss below this was learned; guessing has log 10 = 2.30.
LEARNED = 1.1
#: How far from the loss of fastai's own dropout that of a structured one may be, either way.
BAND = 0.1


@pytest.fixture
def fastai(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's ``fastai.text.models``. An installed fastai comes back afterwards."""
    imported = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fastai"}
    for name in imported:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(STANDINS))
    stats.reset()
    yield importlib.import_module("fastai.text.models")
    sd_plugin.disable("fastai")
    stats.reset()
    for name in [name for name in sys.modules if name.split(".")[0] == "fastai"]:
        del sys.modules[name]
    sys.modules.update(imported)


@pytest.fixture(scope="module")
def text() -> Tensor:
    """``[BATCH, length]`` symbols."""
    generator = torch.Generator().manual_seed(7)
    symbols = [torch.randint(SYMBOLS, (BATCH,), generator=generator)]
    for _ in range(STEPS * 60):
        other = torch.randint(1, SYMBOLS, (BATCH,), generator=generator)
        step = torch.where(torch.rand(BATCH, generator=generator) < LIKELY, 0, other)
        symbols.append((symbols[-1] * 3 + 1 + step) % SYMBOLS)
    return torch.stack(symbols, 1)


def train(fastai: Any, p: float, weight_p: float, text: Tensor, updates: int) -> tuple[list[float], float]:
    """Loss of each update, and the loss on the held-out end of the text afterwards; penalties as fastai's callbacks."""
    torch.manual_seed(3)
    model = fastai.get_language_model(
        SYMBOLS, HIDDEN, HIDDEN, 2, output_p=p, input_p=p, hidden_p=p, weight_p=weight_p, embed_p=0.0
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    seen, held_out = text[:, : -STEPS * 12], text[:, -STEPS * 12 :]
    losses, at = [], 0
    for _ in range(updates):
        if at == 0 or at + STEPS + 1 > seen.shape[1]:
            model.reset()
            at = 0
        logits, raw, out = model(seen[:, at : at + STEPS])
        loss = cross_entropy(logits.flatten(0, 1), seen[:, at + 1 : at + STEPS + 1].flatten())
        losses.append(loss.item())
        loss = loss + 0.2 * out.pow(2).mean() + 0.1 * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at += STEPS
    model.eval().reset()
    with torch.no_grad():
        logits, _, _ = model(held_out[:, :-1])
        return losses, cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()


def test_nothing_dropped_is_the_same_training(fastai: Any, text: Tensor) -> None:
    # fastai drops none of so few, and exact sampling keeps round(0.99 · 40) = 40 units.
    expected, expected_end = train(fastai, 0.0, 1e-15, text, 40)
    sd_plugin.enable("fastai")
    losses, end = train(fastai, 0.01, 0.01, text, 40)
    assert expected[-1] < expected[0] - 0.3, "it learns"
    noise = of_training(torch.float64, 40)
    assert losses == pytest.approx(expected, rel=noise)
    assert end == pytest.approx(expected_end, rel=noise)
    assert len(stats.sites()) == 5


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mode", "places"), [("nr_rh_st", 5), ("nr_st", 3)])
def test_structured_dropout_learns_as_fastais_own(fastai: Any, text: Tensor, mode: str, places: int) -> None:
    _, own = train(fastai, 0.2, 0.2, text, UPDATES)
    assert ENTROPY < own < LEARNED, "the baseline itself has learned"
    sd_plugin.enable("fastai", mode=mode)
    losses, loss = train(fastai, 0.2, 0.2, text, UPDATES)
    assert losses[0] > 2.2, "from knowing nothing"
    assert ENTROPY < loss < LEARNED
    assert abs(loss - own) < BAND
    assert len(stats.sites()) == places
    assert not any(site.lost for site in counted.sites().values()), "every product skipped, throughout"
