"""The paper's translators: OpenNMT-py's RNN model with input feed, De-En and En-Vi.

Where a supported OpenNMT-py is installed its own classes are run, stock and as the patch makes them; elsewhere a
stand-in of the same parts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import opennmt_host
from .columns import NR_RH_ST, NR_ST
from .layers import cross_entropy
from .translation import Translator
from .workload import Product, Setup, Training, Workload, cycle, layer_products

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Shapes and settings; ``p`` is the probability of every dropout. All sentences are equally long."""

    source: int
    target: int
    word_vector: int = 512
    hidden: int = 512
    layers: int = 2
    batch: int = 64
    source_steps: int = 25
    target_steps: int = 25
    p: float = 0.3
    learning_rate: float = 1.0
    clip: float = 5.0
    init: float = 0.1

    def of(self, setup: Setup) -> Sizes:
        """The sizes that ``setup`` asks for."""
        tiny = {"source": 40, "target": 30, "word_vector": 10, "hidden": 12, "batch": 3}
        return replace(self, **tiny, source_steps=4, target_steps=3) if setup.tiny else self


DE_EN = Sizes(source=50_000, target=50_000)
EN_VI = Sizes(source=17_000, target=7_700)

#: Start symbol of a sentence, and how many symbols of the vocabulary are no words, in OpenNMT-py and in the stand-in.
_START, _SPECIAL = 2, 4


def _batches(sizes: Sizes, setup: Setup) -> list[tuple[Tensor, Tensor]]:
    """Source ``[S, B]`` and target ``[T + 1, B]`` of four batches."""
    generator, batches = setup.generator(), []
    for _ in range(4):
        source = torch.randint(_SPECIAL, sizes.source, (sizes.source_steps, sizes.batch), generator=generator)
        target = torch.randint(_SPECIAL, sizes.target, (sizes.target_steps + 1, sizes.batch), generator=generator)
        target[0] = _START
        batches.append((source.to(setup.device), target.to(setup.device)))
    return batches


def _build(full: Sizes, column: str, setup: Setup) -> Training:
    sizes = full.of(setup)
    batch = cycle(_batches(sizes, setup))
    torch.manual_seed(setup.seed)
    p = setup.p(sizes.p)
    if opennmt_host.version():
        model = opennmt_host.build(column, sizes, p).to(setup.device)
        compute = opennmt_host.Loss(column, model, sizes, setup.device)
    else:
        model = Translator(column, sizes, p).to(setup.device)
        compute = partial(_plain_loss, column, model)  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.learning_rate)
    return Training(model, lambda: compute(*batch()), optimizer, sizes.clip, setup.autocast)


def _plain_loss(column: str, model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    """Summed over words, averaged over sentences."""
    scores = model(source, target[:-1])
    loss = cross_entropy(column, scores.flatten(0, 1), target[1:].flatten(), reduction="sum")
    return loss / source.shape[1]


def _products(full: Sizes, setup: Setup) -> list[Product]:
    """Every LSTM matrix, the attention's query and the generator; the attention's other products never skip."""
    sizes = full.of(setup)
    p = setup.p(sizes.p)
    both, only_rh = {NR_ST: p, NR_RH_ST: p}, {NR_RH_ST: p}
    source, target = (sizes.batch,) * sizes.source_steps, (sizes.batch,) * sizes.target_steps
    products = []
    for layer in range(sizes.layers):
        units = sizes.word_vector if layer == 0 else sizes.hidden
        products += layer_products(f"encoder.l{layer}", source, (units, sizes.hidden), both, only_rh)
    for layer in range(sizes.layers):
        # The first layer's input is the embedding and, beside it, the last step's output: both dropped with p.
        units = sizes.word_vector + sizes.hidden if layer == 0 else sizes.hidden
        products += layer_products(f"decoder.l{layer}", target, (units, sizes.hidden), both, only_rh, stepwise=True)
    query = Product("decoder.query", target, sizes.hidden, sizes.hidden, stepwise=True, dropout=only_rh)
    return [*products, query, Product("generator", target, sizes.hidden, sizes.target, dropout=both)]


def _note(full: Sizes, setup: Setup) -> str:
    found = opennmt_host.version()
    stock = f"OpenNMT-py {found}'s own model and loss" if found else "a stand-in, as OpenNMT-py is not installed"
    return (
        f"stock: {stock} (input feed, general attention). Ours: the same with its LSTMs and dropouts replaced; "
        "NR+RH+ST adds dropout of the recurrent states and of the LSTM outputs of encoder and decoder."
    )


def _sizes(full: Sizes, setup: Setup) -> dict[str, Any]:
    return {**asdict(full.of(setup)), "host": opennmt_host.version() or "stand-in"}


def _workload(name: str, title: str, sizes: Sizes) -> Workload:
    build, products = partial(_build, sizes), partial(_products, sizes)
    return Workload(name, title, build, products, partial(_sizes, sizes), partial(_note, sizes))


WORKLOADS = (
    _workload("opennmt-deen", "OpenNMT De-En", DE_EN),
    _workload("opennmt-envi", "OpenNMT En-Vi", EN_VI),
)
