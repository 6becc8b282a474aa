"""A small character model learns a synthetic source: as without the library where nothing is dropped, and as
with random dropout where units are.

The source is a second-order Markov chain of few likely continuations: what there is to learn needs the state,
and its entropy is known, so that a model which has not learned cannot pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sd_plugin import StructuredDropout, StructuredDropoutLSTM, StructuredLinear, stats

from ..more import more
from ..tolerances import of_training

pytestmark = pytest.mark.convergence

SYMBOLS, STEPS, BATCH, HIDDEN, UPDATES = 12, 20, 16, 48, 300
#: A held-out loss below this was learned: the chain's own is 0.61, that of guessing is log 12 = 2.48.
LEARNED = 0.95
#: How far from random dropout's a structured one's held-out loss may be, either way.
BAND = 0.12


def source() -> tuple[Tensor, float]:
    """Text of ``[length, BATCH]`` symbols, and the entropy of a symbol given the two before it, in nats."""
    generator = torch.Generator().manual_seed(11)
    chances = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS)
    likely = torch.rand(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator).argsort(-1)[..., :3]
    chances.scatter_(-1, likely, torch.tensor([0.8, 0.15, 0.05]).expand(SYMBOLS, SYMBOLS, 3))
    text = [torch.randint(SYMBOLS, (BATCH,), generator=generator) for _ in range(2)]
    for _ in range(STEPS * 140):
        text.append(torch.multinomial(chances[text[-2], text[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(text), -sum(p * torch.tensor(p).log().item() for p in (0.8, 0.15, 0.05))


class LanguageModel(nn.Module):
    """Embedding, two layers of an LSTM, projection; a dropout before and after the LSTM."""

    def __init__(self, lstm: nn.LSTM, dropout: nn.Dropout, projection: type[nn.Linear]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, HIDDEN)
        self.lstm = lstm
        self.dropout = dropout
        self.projection = projection(HIDDEN, SYMBOLS)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.dropout(self.embedding(text)), state)
        return self.projection(self.dropout(y)), state


def stock(p: float) -> LanguageModel:
    return LanguageModel(nn.LSTM(HIDDEN, HIDDEN, 2, dropout=p), nn.Dropout(p), nn.Linear)


def structured(p: float, mode: str = "nr_rh_st", recurrent: float = 0.0, **options: bool) -> LanguageModel:
    lstm = StructuredDropoutLSTM(
        HIDDEN, HIDDEN, 2, dropout=p, recurrent_dropout=recurrent, mode=mode, native=False, **options
    )
    return LanguageModel(lstm, StructuredDropout(p, "III"), StructuredLinear)


def train(model: LanguageModel, text: Tensor, updates: int) -> tuple[list[float], float]:
    """Loss of each update, and the loss on the held-out end of the text afterwards."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.15, 0.15)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    seen, held_out = text[: -STEPS * 10], text[-STEPS * 10 :]
    losses, state, at = [], None, 0
    for _ in range(updates):
        if at + STEPS + 1 > len(seen):
            state, at = None, 0
        logits, state = model(seen[at : at + STEPS], state)
        state = (state[0].detach(), state[1].detach())
        loss = cross_entropy(logits.flatten(0, 1), seen[at + 1 : at + STEPS + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        at += STEPS
    model.eval()
    with torch.no_grad():
        logits, _ = model(held_out[:-1], None)
        return losses, cross_entropy(logits.flatten(0, 1), held_out[1:].flatten()).item()


@pytest.fixture(scope="module")
def text_and_entropy() -> tuple[Tensor, float]:
    return source()


@pytest.fixture(scope="module")
def random_dropout(text_and_entropy: tuple[Tensor, float]) -> float:
    """Held-out loss of the baseline: the stock model with its own random dropout."""
    text, entropy = text_and_entropy
    _, loss = train(stock(0.2), text, UPDATES)
    assert entropy < loss < LEARNED, "the baseline itself has learned"
    return loss


def test_nothing_dropped_is_the_same_training(text_and_entropy: tuple[Tensor, float]) -> None:
    text, _ = text_and_entropy
    expected, expected_end = train(stock(0.0).double(), text, 60)
    losses, end = train(structured(0.0).double(), text, 60)
    assert expected[-1] < expected[0] - 0.3, "it learns"
    noise = of_training(torch.float64, 60)
    assert losses == pytest.approx(expected, rel=noise)
    assert end == pytest.approx(expected_end, rel=noise)


@pytest.mark.parametrize(
    ("mode", "recurrent", "locked"),
    [*more(("nr_st", 0.0, False)), ("nr_rh_st", 0.2, False), *more(("nr_rh_st", 0.2, True))],
    ids=["nr_st", "nr_rh_st", "nr_rh_st locked"],
)
def test_structured_dropout_learns_as_random_dropout(
    text_and_entropy: tuple[Tensor, float], random_dropout: float, mode: str, recurrent: float, locked: bool
) -> None:
    text, entropy = text_and_entropy
    stats.reset()
    losses, loss = train(structured(0.2, mode, recurrent, locked=locked), text, UPDATES)
    assert losses[0] > 2.4, "from knowing nothing"
    assert entropy < loss < LEARNED
    assert abs(loss - random_dropout) < BAND
    lost = {name: site.lost for name, site in stats.sites().items() if site.lost}
    stats.reset()
    assert not lost, "every product skipped, throughout"
