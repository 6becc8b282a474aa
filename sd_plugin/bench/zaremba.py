"""Zaremba et al. 2014's medium and large language models on the Penn Treebank's shapes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .columns import NR_RH_ST, NR_ST, SKIPPING
from .layers import cross_entropy, detached, dropout, linear, lstm
from .workload import Product, Setup, Training, Workload, cycle, layer_products

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Shapes and settings; ``p`` is the probability of every dropout, the recurrent one of NR+RH+ST included."""

    hidden: int
    p: float
    clip: float
    init: float
    vocabulary: int = 10_000
    layers: int = 2
    batch: int = 20
    steps: int = 35
    learning_rate: float = 1.0

    def of(self, setup: Setup) -> Sizes:
        """The sizes that ``setup`` asks for."""
        return replace(self, hidden=16, vocabulary=50, batch=3, steps=4) if setup.tiny else self


MEDIUM = Sizes(hidden=650, p=0.5, clip=5.0, init=0.05)
LARGE = Sizes(hidden=1500, p=0.65, clip=10.0, init=0.04)


class LanguageModel(nn.Module):
    """Embedding, stacked LSTM and projection, with dropout before, between and after the layers."""

    def __init__(self, column: str, sizes: Sizes, p: float) -> None:
        super().__init__()
        structured = {"input_dropout": p, "output_dropout": p} if column in SKIPPING else {}
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        # The structured LSTM has these two inside.
        self.before = nn.Identity() if structured else dropout(column, p, "embedding")
        self.after = nn.Identity() if structured else dropout(column, p, "output")
        self.rnn = lstm(column, sizes.hidden, sizes.hidden, sizes.layers, dropout=p, recurrent_dropout=p, **structured)
        self.projection = linear(column, sizes.hidden, sizes.vocabulary)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -sizes.init, sizes.init)

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits ``[T, B, V]`` of tokens ``[T, B]``, and the state to go on with."""
        y, state = self.rnn(self.before(self.embedding(tokens)), state)
        logits: Tensor = self.projection(self.after(y))
        return logits, state


class _Sequences:
    """The loss of successive sequences, with the hidden state carried over from one to the next."""

    def __init__(self, column: str, model: LanguageModel, sizes: Sizes, setup: Setup) -> None:
        shape = (4, sizes.steps + 1, sizes.batch)
        self._batch = cycle(
            torch.randint(sizes.vocabulary, shape, generator=setup.generator()).to(setup.device)  # type: ignore[arg-type]
        )
        self._model, self._column = model, column
        state = torch.zeros(sizes.layers, sizes.batch, sizes.hidden, device=setup.device)
        self._state = (state, state)

    def __call__(self) -> Tensor:
        tokens: Tensor = self._batch()
        logits, state = self._model(tokens[:-1], self._state)
        self._state = detached(state)
        # Zaremba's: summed over the batch, averaged over time.
        return cross_entropy(self._column, logits.flatten(0, 1), tokens[1:].flatten()) * tokens.shape[1]


def _build(full: Sizes, column: str, setup: Setup) -> Training:
    sizes = full.of(setup)
    torch.manual_seed(setup.seed)
    model = LanguageModel(column, sizes, setup.p(sizes.p)).to(setup.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.learning_rate)
    return Training(model, _Sequences(column, model, sizes, setup), optimizer, sizes.clip, setup.autocast)


def _products(full: Sizes, setup: Setup) -> list[Product]:
    sizes = full.of(setup)
    rows, p = (sizes.batch,) * sizes.steps, setup.p(sizes.p)
    shape = (sizes.hidden, sizes.hidden)
    layers = [
        product
        for layer in range(sizes.layers)
        for product in layer_products(f"rnn.l{layer}", rows, shape, {NR_ST: p, NR_RH_ST: p}, {NR_RH_ST: p})
    ]
    return [*layers, Product("projection", rows, sizes.hidden, sizes.vocabulary, dropout={NR_ST: p, NR_RH_ST: p})]


def _note(full: Sizes, setup: Setup) -> str:
    p = full.of(setup).p
    return (
        f"stock: nn.LSTM of two layers, nn.Dropout({p}) before, between and after them, nn.Linear; "
        f"NR+RH+ST adds {p} on the recurrent state."
    )


def _sizes(full: Sizes, setup: Setup) -> dict[str, Any]:
    return asdict(full.of(setup))


def _workload(name: str, title: str, sizes: Sizes) -> Workload:
    build, products = partial(_build, sizes), partial(_products, sizes)
    return Workload(name, title, build, products, partial(_sizes, sizes), partial(_note, sizes))


WORKLOADS = (
    _workload("zaremba-medium", "Zaremba medium", MEDIUM),
    _workload("zaremba-large", "Zaremba large", LARGE),
)
