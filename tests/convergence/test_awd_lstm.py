"""The language model of awd-lstm-lm's stand-in learns a synthetic source: as without the plugin where nothing is
dropped, and as with the host's own dropout where units are.

The source is a second-order Markov chain of few likely continuations: what there is to learn needs the state.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sd_plugin import disable, enable, stats

from .. import counted
from ..more import more
from ..tolerances import of_training

pytestmark = pytest.mark.convergence

STANDIN = Path(__file__).parents[1] / "patches" / "standins" / "awd_lstm"
MODULES = ("data", "embed_regularize", "locked_dropout", "model", "splitcross", "utils", "weight_drop")
SYMBOLS, STEPS, BATCH, HIDDEN, UPDATES = 12, 20, 16, 48, 300
RATES = {"dropout": 0.15, "dropouth": 0.15, "dropouti": 0.15, "dropoute": 0.02}
WEIGHT_DROP = 0.2
#: Nothing is dropped at this rate, but all that drops is run.
NEVER = 1e-9
#: A held-out loss below this was learned: the chain's own is 0.61, that of guessing is log 12 = 2.48.
LEARNED = 0.95
#: How far from the host's own dropout a structured one's held-out loss may be, either way; of six seeds, none was
#: farther than 0.04.
BAND = 0.06


@pytest.fixture(scope="module")
def host() -> Iterator[SimpleNamespace]:
    """The stand-in's modules; nothing of them is left afterwards."""
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(STANDIN))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        disable("awd_lstm")
        sys.path.remove(str(STANDIN))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(others)


@pytest.fixture(scope="module")
def text() -> Tensor:
    """``[length, BATCH]`` symbols."""
    generator = torch.Generator().manual_seed(11)
    chances = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS)
    likely = torch.rand(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator).argsort(-1)[..., :3]
    chances.scatter_(-1, likely, torch.tensor([0.8, 0.15, 0.05]).expand(SYMBOLS, SYMBOLS, 3))
    rows = [torch.randint(SYMBOLS, (BATCH,), generator=generator) for _ in range(2)]
    for _ in range(STEPS * 140):
        rows.append(torch.multinomial(chances[rows[-2], rows[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(rows)


def train(
    host: SimpleNamespace, text: Tensor, updates: int, rates: dict[str, float], wdrop: float
) -> tuple[list[float], float]:
    """Loss of each update with the host's two regularisers, and the loss on the held-out end of the text afterwards."""
    torch.manual_seed(3)
    model = host.model.RNNModel("LSTM", SYMBOLS, HIDDEN, HIDDEN, 2, **rates, wdrop=wdrop, tie_weights=True)
    criterion = host.splitcross.SplitCrossEntropyLoss(HIDDEN, [])
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    seen, held_out = text[: -STEPS * 10], text[-STEPS * 10 :]
    losses, hidden, at = [], model.init_hidden(BATCH), 0
    for _ in range(updates):
        if at + STEPS + 1 > len(seen):
            hidden, at = model.init_hidden(BATCH), 0
        hidden = host.utils.repackage_hidden(hidden)
        output, hidden, raw_outputs, outputs = model(seen[at : at + STEPS], hidden, return_h=True)
        targets = seen[at + 1 : at + STEPS + 1].flatten()
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        losses.append(loss.item())
        regularised = outputs[-1].pow(2).mean() + (raw_outputs[-1][1:] - raw_outputs[-1][:-1]).pow(2).mean()
        optimizer.zero_grad()
        (loss + 0.01 * regularised).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at += STEPS
    model.eval()
    with torch.no_grad():
        output, _ = model(held_out[:-1], model.init_hidden(BATCH))
        end = criterion(model.decoder.weight, model.decoder.bias, output, held_out[1:].flatten())
    return losses, end.item()


@pytest.fixture(scope="module")
def own_dropout(host: SimpleNamespace, text: Tensor) -> float:
    """Held-out loss of the baseline: the host's own dropout, unpatched."""
    disable("awd_lstm")
    losses, loss = train(host, text, UPDATES, RATES, WEIGHT_DROP)
    assert losses[0] > 2.4, "from knowing nothing"
    assert 0.61 < loss < LEARNED, "the baseline itself has learned"
    return loss


@pytest.mark.parametrize("mode", [*more("nr_st"), "nr_rh_st"])
def test_nothing_dropped_is_the_same_training(host: SimpleNamespace, text: Tensor, mode: str) -> None:
    never = dict.fromkeys(RATES, NEVER)
    disable("awd_lstm")
    expected, expected_end = train(host, text, 60, never, NEVER)
    enable("awd_lstm", mode=mode, folder=STANDIN)
    stats.reset()
    losses, end = train(host, text, 60, never, NEVER)
    assert expected[-1] < expected[0] - 0.3, "it learns"
    # Sums are taken in another order, and training carries the difference on.
    noise = of_training(torch.float32, 60)
    assert losses == pytest.approx(expected, rel=noise)
    assert end == pytest.approx(expected_end, rel=noise)
    assert all(site.used == site.drawn == 60 and site.dropped == 0 for site in counted.sites().values())
    assert len(stats.sites()) == {"nr_st": 3, "nr_rh_st": 5}[mode], "all of its places ran"
    stats.reset()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mode", "case"),
    [("nr_st", "III"), ("nr_rh_st", "III"), ("nr_rh_st", "IV")],
    ids=["nr_st", "nr_rh_st", "locked"],
)
def test_structured_dropout_learns_as_the_hosts_own(
    host: SimpleNamespace, text: Tensor, own_dropout: float, mode: str, case: str
) -> None:
    enable("awd_lstm", mode=mode, case=case, folder=STANDIN)
    stats.reset()
    losses, loss = train(host, text, UPDATES, RATES, WEIGHT_DROP)
    lost = {name: site.lost for name, site in stats.sites().items() if site.lost}
    dropped = {name for name, site in stats.sites().items() if site.dropped}
    stats.reset()
    assert losses[0] > 2.4, "from knowing nothing"
    assert 0.61 < loss < LEARNED
    assert abs(loss - own_dropout) < BAND
    assert not lost, "every product skipped, throughout"
    assert len(dropped) == (3 if mode == "nr_st" else 5)
