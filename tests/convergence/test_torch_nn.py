"""A small model of stock modules, patched from outside, learns what it learns without the patch: the same where nothing
is dropped, and as well where units are.

The source is a second-order Markov chain, so that what there is to learn needs the state, and the entropy is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sd_plugin
from sd_plugin import stats

from ..more import more
from ..tolerances import of_training

pytestmark = pytest.mark.convergence

SYMBOLS, STEPS, BATCH, HIDDEN, UPDATES = 10, 16, 16, 40, 300
CHANCES = (0.85, 0.1, 0.05)
ENTROPY = -sum(p * math.log(p) for p in CHANCES)
#: A held-out loss below this was learned; guessing has log 10 = 2.30.
LEARNED = 0.9
#: How far from random dropout's a structured one's held-out loss may be, either way.
BAND = 0.12


class LanguageModel(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, HIDDEN)
        self.drop = nn.Dropout(p)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, 2, dropout=p, batch_first=True)
        self.projection = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.drop(self.embedding(text)), state)
        return self.projection(self.drop(y)), state


@pytest.fixture(scope="module")
def text() -> Tensor:
    """``[BATCH, length]`` symbols."""
    generator = torch.Generator().manual_seed(7)
    chances = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS)
    likely = torch.rand(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator).argsort(-1)[..., : len(CHANCES)]
    chances.scatter_(-1, likely, torch.tensor(CHANCES).expand(SYMBOLS, SYMBOLS, -1))
    symbols = [torch.randint(SYMBOLS, (BATCH,), generator=generator) for _ in range(2)]
    for _ in range(STEPS * 160):
        symbols.append(torch.multinomial(chances[symbols[-2], symbols[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(symbols, 1)


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> Iterator[None]:
    stats.reset()
    yield
    sd_plugin.disable("torch_nn")
    stats.reset()


def train(p: float, text: Tensor, updates: int, dtype: torch.dtype = torch.float32) -> tuple[list[float], float]:
    """Loss of each update, and the loss on the held-out end of the text afterwards."""
    torch.manual_seed(3)
    model = LanguageModel(p).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    seen, held_out = text[:, : -STEPS * 12], text[:, -STEPS * 12 :]
    losses, state, at = [], None, 0
    for _ in range(updates):
        if at + STEPS + 1 > seen.shape[1]:
            state, at = None, 0
        logits, state = model(seen[:, at : at + STEPS], state)
        state = (state[0].detach(), state[1].detach())
        loss = cross_entropy(logits.flatten(0, 1), seen[:, at + 1 : at + STEPS + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        at += STEPS
    model.eval()
    with torch.no_grad():
        logits, _ = model(held_out[:, :-1], None)
        return losses, cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()


@pytest.fixture(scope="module")
def random_dropout(text: Tensor) -> float:
    """Held-out loss of the same program without the patch."""
    _, loss = train(0.2, text, UPDATES)
    assert ENTROPY < loss < LEARNED, "the baseline itself has learned"
    return loss


@pytest.mark.parametrize(
    ("p", "dtype", "noise"),
    # A dropout of 0.01 keeps round(0.99 · 40) = 40 units: everything runs through this library, and nothing is zero.
    [
        (0.0, torch.float32, 0.0),
        (0.01, torch.float32, of_training(torch.float32, 60)),
        (0.01, torch.float64, of_training(torch.float64, 60)),
    ],
    ids=["no dropout", "nothing dropped", "nothing dropped, float64"],
)
def test_nothing_dropped_is_the_same_training(text: Tensor, p: float, dtype: torch.dtype, noise: float) -> None:
    expected, expected_end = train(0.0, text, 60, dtype)
    sd_plugin.enable("torch_nn")
    losses, end = train(p, text, 60, dtype)
    assert expected[-1] < expected[0] - 0.3, "it learns"
    assert losses == pytest.approx(expected, rel=noise, abs=0)
    assert end == pytest.approx(expected_end, rel=noise, abs=0)
    assert len(stats.sites()) == (4 if p else 0)


@pytest.mark.parametrize(("mode", "case"), [*more(("nr_st", "III")), ("nr_rh_st", "III"), *more(("nr_rh_st", "IV"))])
def test_structured_dropout_learns_as_random_dropout(text: Tensor, random_dropout: float, mode: str, case: str) -> None:
    sd_plugin.enable("torch_nn", mode=mode, case=case)
    losses, loss = train(0.2, text, UPDATES)
    assert losses[0] > 2.2, "from knowing nothing"
    assert ENTROPY < loss < LEARNED
    assert abs(loss - random_dropout) < BAND
    sites = stats.sites()
    assert len(sites) == (2 if mode == "nr_st" else 4)
    assert not any(site.lost for site in sites.values()), "every product skipped, throughout"
