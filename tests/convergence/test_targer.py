"""A small tagger of targer's kind learns a rule: as the original where nothing is dropped, and as with random dropout.

A word's tag follows from both of its neighbours, so that only a model whose two directions work can know it. The model
is the stand-in's: embeddings, character CNN, bidirectional LSTM. Some tags are noise, so that the best loss is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from sd_plugin import hints, stats
from sd_plugin.patches import targer

from .. import counted
from ..more import more
from ..patches import targer_stand_in as stand_in
from ..tolerances import of_training

pytestmark = pytest.mark.convergence

WORDS = [f"w{k}" for k in range(9)]
TAGS = ["O", "B-PER", "B-LOC"]
#: Chances that a tag is the right one, or one of the two others.
NOISE = (0.8, 0.1, 0.1)
ENTROPY = -sum(p * math.log(p) for p in NOISE)
BATCH, UPDATES, DROPOUT = 16, 250, 0.5
#: A held-out loss below this was learned: the rule itself has 0.64, guessing log 3 = 1.10.
LEARNED = 0.7
#: How far from random dropout's a structured one's held-out loss may be, either way.
BAND = 0.03

Modules = dict[str, ModuleType]
Sentences = tuple[list[list[str]], list[list[str]]]


def sentences(count: int, seed: int) -> Sentences:
    """Sentences of different lengths, and their tags."""
    generator = torch.Generator().manual_seed(seed)
    words, tags = [], []
    for _ in range(count):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        drawn = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        marks = [False, *(k < 3 for k in drawn), False]
        words.append([WORDS[k] for k in drawn])
        # Of the word before, or else of the word after.
        right = [1 if marks[t] else 2 if marks[t + 2] else 0 for t in range(length)]
        noise = torch.multinomial(torch.tensor(NOISE), length, replacement=True, generator=generator).tolist()
        tags.append([TAGS[(tag + other) % 3] for tag, other in zip(right, noise, strict=True)])
    return words, tags


TRAINING, HELD_OUT = sentences(BATCH * UPDATES, 1), sentences(400, 2)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Modules]:
    with stand_in.imported(stand_in.copy(tmp_path_factory.mktemp("targer") / "targer")) as modules:
        yield modules


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    stats.reset()
    yield
    targer.disable()
    stats.reset()


def train(host: Modules, dropout: float, updates: int) -> tuple[list[float], float]:
    """Loss of each update, and the loss on held-out sentences afterwards."""
    torch.manual_seed(3)
    tagger: Any = stand_in.tagger(host, words=WORDS, tags=TAGS, dropout_ratio=dropout, rnn_hidden_dim=32)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.01)
    losses = []
    for update in range(updates):
        at = update * BATCH
        tagger.train()
        tagger.zero_grad()
        loss = tagger.get_loss(*(part[at : at + BATCH] for part in TRAINING))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tagger.eval()
    with torch.no_grad():
        return losses, tagger.get_loss(*HELD_OUT).item()


@pytest.fixture(scope="module")
def random_dropout(host: Modules) -> float:
    """Held-out loss of the paper's baseline."""
    targer.enable("random")
    _, loss = train(host, DROPOUT, UPDATES)
    targer.disable()
    assert ENTROPY - BAND < loss < LEARNED, "the baseline itself has learned"
    return loss


@pytest.mark.parametrize("mode", [*more("random", "nr_st"), "nr_rh_st"])
def test_nothing_dropped_is_the_same_training(host: Modules, mode: str) -> None:
    expected, expected_end = train(host, 0.0, 60)
    assert expected[-1] < expected[0] - 0.2, "it learns"
    targer.enable(mode)
    losses, end = train(host, 0.0, 60)
    noise = of_training(torch.float32, 60)
    assert losses == pytest.approx(expected, rel=noise)
    assert end == pytest.approx(expected_end, rel=noise)


def test_skipping_is_the_same_training_as_not_skipping(host: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    targer.enable("nr_st")
    losses, end = train(host, DROPOUT, 60)
    assert stats.sites()["birnn.input"].skipped > 0
    stats.reset()
    # The same values are zero, but nobody is told: the products are torch's own.
    monkeypatch.setattr(hints, "lookup", lambda tensor: None)
    dense, dense_end = train(host, DROPOUT, 60)
    assert stats.sites()["birnn.input"].skipped == 0
    noise = of_training(torch.float32, 60)
    assert losses == pytest.approx(dense, rel=noise)
    assert end == pytest.approx(dense_end, rel=noise)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["nr_st", "nr_rh_st"])
def test_structured_dropout_learns_as_random_dropout(host: Modules, random_dropout: float, mode: str) -> None:
    targer.enable(mode)
    losses, loss = train(host, DROPOUT, UPDATES)
    assert losses[0] > 1.0, "from knowing nothing"
    assert ENTROPY - BAND < loss < LEARNED
    assert abs(loss - random_dropout) < BAND
    assert len(stats.sites()) == {"nr_st": 1, "nr_rh_st": 3}[mode]
    assert not any(site.lost for site in counted.sites().values()), "every product skipped, throughout"
