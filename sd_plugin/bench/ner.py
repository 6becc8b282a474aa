"""The LSTM part of targer's BiLSTM-CNN-CRF at CoNLL-2003's shapes.

Its character CNN and CRF are Python loops that no dropout touches, and most of its step. Left out here: what is timed
is the bidirectional LSTM, the emission layer and a cross entropy, on a given concatenation of word and character
features, whose gradient is taken too, since the layers below need it.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .columns import NR_RH_ST, NR_ST, SKIPPING
from .layers import cross_entropy, lstm
from .workload import Product, Setup, Training, Workload, layer_products

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """targer's defaults: 100-dimensional words and 30 character filters, 100 hidden units in each direction.

    ``tags`` are the nine of CoNLL-2003 and targer's padding and start. Lengths follow a gamma distribution whose
    mean and deviation are about those of CoNLL-2003's training sentences.
    """

    features: int = 130
    hidden: int = 100
    tags: int = 11
    batch: int = 10
    p: float = 0.5
    mean_length: float = 14.5
    length_deviation: float = 11.8
    longest: int = 113
    learning_rate: float = 0.01
    momentum: float = 0.9
    clip: float = 5.0

    @classmethod
    def of(cls, setup: Setup) -> Sizes:
        """The sizes that ``setup`` asks for."""
        return cls(features=12, hidden=8, batch=3, mean_length=4.0, length_deviation=2.0) if setup.tiny else cls()


@lru_cache
def lengths(sizes: Sizes, seed: int) -> tuple[int, ...]:
    """The lengths of a batch's sentences, longest first: of a hundred batches drawn, the one of most typical size."""
    source = random.Random(seed)
    shape = (sizes.mean_length / sizes.length_deviation) ** 2
    scale = sizes.mean_length / shape

    def draw() -> list[int]:
        drawn = (round(source.gammavariate(shape, scale)) for _ in range(sizes.batch))
        return sorted((min(sizes.longest, max(1, n)) for n in drawn), reverse=True)

    expected = sizes.mean_length * sizes.batch
    return tuple(min((draw() for _ in range(100)), key=lambda drawn: abs(sum(drawn) - expected)))


class Tagger(nn.Module):
    """Dropout, bidirectional LSTM and emission layer on packed features."""

    def __init__(self, column: str, sizes: Sizes, p: float) -> None:
        super().__init__()
        structured: dict[str, Any] = {"input_dropout": p} if column in SKIPPING else {}
        self.dropout = nn.Identity() if structured else nn.Dropout(p)
        self.rnn = lstm(column, sizes.features, sizes.hidden, recurrent_dropout=p, bidirectional=True, **structured)
        # Its input is not dropped in any column.
        self.emission = nn.Linear(2 * sizes.hidden, sizes.tags)

    def forward(self, features: PackedSequence) -> Tensor:
        """Scores ``[R, tags]`` of packed features."""
        y, _ = self.rnn(features._replace(data=self.dropout(features.data)))
        scores: Tensor = self.emission(y.data)
        return scores


def _build(column: str, setup: Setup) -> Training:
    sizes, generator = Sizes.of(setup), setup.generator()
    drawn = lengths(sizes, setup.seed)
    padded = torch.randn(drawn[0], sizes.batch, sizes.features, generator=generator)
    packed = pack_padded_sequence(padded, torch.tensor(drawn))
    packed = packed._replace(data=packed.data.to(setup.device).requires_grad_())
    tags = torch.randint(sizes.tags, (sum(drawn),), generator=generator).to(setup.device)
    torch.manual_seed(setup.seed)
    model = Tagger(column, sizes, setup.p(sizes.p)).to(setup.device)

    def loss() -> Tensor:
        packed.data.grad = None
        return cross_entropy(column, model(packed), tags)

    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.learning_rate, momentum=sizes.momentum)
    return Training(model, loss, optimizer, sizes.clip, setup.autocast)


def _products(setup: Setup) -> list[Product]:
    sizes, p = Sizes.of(setup), setup.p(Sizes.p)
    drawn = lengths(sizes, setup.seed)
    rows = tuple(sum(length > t for length in drawn) for t in range(drawn[0]))
    shape = (sizes.features, sizes.hidden)
    layer = layer_products("rnn", rows, shape, {NR_ST: p, NR_RH_ST: p}, {NR_RH_ST: p}, count=2)
    return [*layer, Product("emission", rows, 2 * sizes.hidden, sizes.tags)]


def _note(setup: Setup) -> str:
    drawn = lengths(Sizes.of(setup), setup.seed)
    return (
        "LSTM part only: no character CNN, no CRF. stock: nn.Dropout on the features, packed bidirectional nn.LSTM, "
        f"nn.Linear, cross entropy. One batch of sentence lengths {', '.join(map(str, drawn))}."
    )


def _sizes(setup: Setup) -> dict[str, Any]:
    return {**asdict(Sizes.of(setup)), "lengths": list(lengths(Sizes.of(setup), setup.seed))}


WORKLOADS = (Workload("ner", "NER (LSTM part)", _build, _products, _sizes, _note),)
