"""AWD-LSTM (Merity et al. 2017) on the Penn Treebank's shapes.

The stock model is that of a checkout of salesforce/awd-lstm-lm where one is given and can be imported, otherwise a
stand-in of the same parts.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..dropout import StructuredDropout
from ..lstm import StructuredDropoutLSTM
from .columns import DENSE, NR_RH_ST, STOCK
from .layers import DropConnectLSTM, LockedDropout, cross_entropy, detached, linear
from .workload import Product, Setup, Training, Workload, cycle, layer_products

if TYPE_CHECKING:
    from torch import Tensor

NAME = "awd-lstm"


@dataclass(frozen=True)
class Sizes:
    """Shapes and settings of the paper's AWD-LSTM; ``weight_p`` is DropConnect's, or the recurrent dropout's."""

    vocabulary: int = 10_000
    embedding: int = 400
    hidden: int = 1150
    layers: int = 3
    batch: int = 20
    steps: int = 70
    input_p: float = 0.4
    embedding_p: float = 0.1
    hidden_p: float = 0.25
    output_p: float = 0.4
    weight_p: float = 0.5
    alpha: float = 2.0
    beta: float = 1.0
    learning_rate: float = 30.0
    weight_decay: float = 1.2e-6
    clip: float = 0.25

    @classmethod
    def of(cls, setup: Setup) -> Sizes:
        """The sizes that ``setup`` asks for."""
        return cls(vocabulary=50, embedding=10, hidden=16, batch=3, steps=4) if setup.tiny else cls()

    def layer_sizes(self) -> list[tuple[int, int]]:
        """Input and hidden size of each layer; the last is as wide as the embedding, whose weight is tied."""
        widths = [self.embedding, *[self.hidden] * (self.layers - 1), self.embedding]
        return list(pairwise(widths))

    def dropouts(self) -> list[float]:
        """Probabilities before each layer and after the last."""
        return [self.input_p, *[self.hidden_p] * (self.layers - 1), self.output_p]


def _rnn(column: str, sizes: tuple[int, int], p: float, layer: int) -> nn.LSTM:
    if column == STOCK:
        return DropConnectLSTM(*sizes, weight_dropout=p)
    # Dense: random recurrent dropout takes the place of DropConnect; locked, as DropConnect's mask is.
    return StructuredDropoutLSTM(
        *sizes,
        recurrent_dropout=p,
        mode="random" if column == DENSE else column,
        locked=column == DENSE,
        native=False,
        site=f"rnns.{layer}",
    )


class AWDModel(nn.Module):
    """The parts of salesforce/awd-lstm-lm's ``RNNModel``, under its parameter names, for every column."""

    def __init__(self, column: str, sizes: Sizes, setup: Setup) -> None:
        super().__init__()
        self.embedding_p = setup.p(sizes.embedding_p)
        self.encoder = nn.Embedding(sizes.vocabulary, sizes.embedding)
        shapes = enumerate(sizes.layer_sizes())
        self.rnns = nn.ModuleList(_rnn(column, shape, setup.p(sizes.weight_p), layer) for layer, shape in shapes)
        self.dropouts = nn.ModuleList(
            LockedDropout(setup.p(p)) if column in (STOCK, DENSE) else StructuredDropout(setup.p(p), site=f"drop.{i}")
            for i, p in enumerate(sizes.dropouts())
        )
        self.decoder = linear(column, sizes.embedding, sizes.vocabulary)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """``[T, B, E]``; whole word types are dropped, the same ones in all of the batch."""
        weight, p = self.encoder.weight, self.embedding_p
        if p > 0.0:
            weight = weight * weight.new_empty(weight.shape[0], 1).bernoulli_(1.0 - p).div_(1.0 - p)
        return nn.functional.embedding(tokens, weight)

    def forward(self, tokens: Tensor, states: list[Any]) -> tuple[Tensor, list[Any], Tensor, Tensor]:
        """Logits ``[T·B, V]``, the new states, and the last layer's output before and after its dropout."""
        x = self.dropouts[0](self.embed(tokens))
        after: list[Any] = []
        for rnn, drop, state in zip(self.rnns, list(self.dropouts)[1:], states, strict=True):
            raw, state = rnn(x, state)
            x = drop(raw)
            after.append(state)
        return self.decoder(x.view(-1, x.shape[2])), after, raw, x


def regularized(loss: Tensor, raw: Tensor, dropped: Tensor, sizes: Sizes) -> Tensor:
    """``loss`` plus activation regularization (AR) and temporal activation regularization (TAR)."""
    return (
        loss + sizes.alpha * dropped.pow(2).mean() + sizes.beta * (raw[1:] - raw[:-1]).pow(2).mean()
    )  # fmt: skip


class _Sequences:
    """The loss of successive sequences, with the hidden states carried over."""

    def __init__(self, sizes: Sizes, setup: Setup) -> None:
        shape = (4, sizes.steps + 1, sizes.batch)
        self._batch = cycle(
            torch.randint(sizes.vocabulary, shape, generator=setup.generator()).to(setup.device)  # type: ignore[arg-type]
        )
        self._sizes = sizes
        zeros = [torch.zeros(1, sizes.batch, hidden, device=setup.device) for _, hidden in sizes.layer_sizes()]
        self._states: list[Any] = [(zero, zero) for zero in zeros]

    def of_ours(self, column: str, model: nn.Module) -> Tensor:
        """The loss of :class:`AWDModel`."""
        tokens = self._batch()
        logits, states, raw, dropped = model(tokens[:-1], self._states)
        self._states = detached(states)
        return regularized(cross_entropy(column, logits, tokens[1:].flatten()), raw, dropped, self._sizes)

    def of_host(self, model: Any, criterion: Any) -> Tensor:
        """The loss as the host's main.py computes it; there the product of the decoder is in the criterion."""
        tokens = self._batch()
        output, states, raws, drops = model(tokens[:-1], self._states, return_h=True)
        self._states = detached(states)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, tokens[1:].flatten())
        return regularized(loss, raws[-1], drops[-1], self._sizes)


#: Top-level names of the checkout's modules, which must neither hide nor stay in front of anybody else's.
_HOST_MODULES = ("model", "splitcross", "embed_regularize", "locked_dropout", "weight_drop")


@contextlib.contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Imports inside find the modules of ``folder`` first; afterwards those names are as they were."""
    hidden = {name: sys.modules.pop(name) for name in _HOST_MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        # The host prints while it builds.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.path.remove(str(folder))
        for name in _HOST_MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _host_model(folder: Path, sizes: Sizes, setup: Setup) -> tuple[Any, Any]:
    """The checkout's model and criterion."""
    with _modules_of(folder):
        module, splitcross = importlib.import_module("model"), importlib.import_module("splitcross")
        model = module.RNNModel(
            "LSTM",
            sizes.vocabulary,
            sizes.embedding,
            sizes.hidden,
            sizes.layers,
            setup.p(sizes.output_p),
            setup.p(sizes.hidden_p),
            setup.p(sizes.input_p),
            setup.p(sizes.embedding_p),
            setup.p(sizes.weight_p),
            True,
        )
        return model, splitcross.SplitCrossEntropyLoss(sizes.embedding, splits=[], verbose=False)


@lru_cache
def _host_problem(folder: Path) -> str | None:
    """Why the checkout's model cannot be trained here; None when it can."""
    tiny = Setup(tiny=True)
    sizes = Sizes.of(tiny)
    try:
        model, criterion = _host_model(folder, sizes, tiny)
        _Sequences(sizes, tiny).of_host(model, criterion).backward()
    except Exception as error:  # whatever a stranger's code raises, the stand-in is there
        return type(error).__name__
    return None


def _host(setup: Setup) -> Path | None:
    """The checkout to run, if one was given and can be trained."""
    folder = setup.hosts.get(NAME)
    return folder if folder is not None and _host_problem(folder) is None else None


def _build(column: str, setup: Setup) -> Training:
    sizes, folder = Sizes.of(setup), _host(setup)
    sequences = _Sequences(sizes, setup)
    torch.manual_seed(setup.seed)
    model: nn.Module
    if column == STOCK and folder is not None:
        model, criterion = _host_model(folder, sizes, setup)
        loss = lambda: sequences.of_host(model, criterion)  # noqa: E731
    else:
        model = AWDModel(column, sizes, setup)
        loss = lambda: sequences.of_ours(column, model)  # noqa: E731
    model.to(setup.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.learning_rate, weight_decay=sizes.weight_decay)
    return Training(model, loss, optimizer, sizes.clip, setup.autocast)


def _products(setup: Setup) -> list[Product]:
    sizes = Sizes.of(setup)
    rows = (sizes.batch,) * sizes.steps
    recurrent = {NR_RH_ST: setup.p(sizes.weight_p)}
    *before, last = ({NR_RH_ST: setup.p(p)} for p in sizes.dropouts())
    layers = [
        product
        for i, (shape, p) in enumerate(zip(sizes.layer_sizes(), before, strict=True))
        for product in layer_products(f"rnns.{i}", rows, shape, p, recurrent)
    ]
    return [*layers, Product("decoder", rows, sizes.embedding, sizes.vocabulary, dropout=last)]


def _note(setup: Setup) -> str:
    if _host(setup) is not None:
        stock = "the checkout of salesforce/awd-lstm-lm"
    elif NAME in setup.hosts:
        stock = f"a stand-in, since the checkout failed ({_host_problem(setup.hosts[NAME])})"
    else:
        stock = "a stand-in written from its description"
    return (
        f"stock: {stock} (LockedDropout, DropConnect on weight_hh). Ours, dense: its LockedDropout, and random locked "
        "dropout of the recurrent state instead of DropConnect. NR+RH+ST: varying structured dropouts, and recurrent "
        "dropout instead of DropConnect. The paper has no NR+ST row for it."
    )


def _sizes(setup: Setup) -> dict[str, Any]:
    return asdict(Sizes.of(setup))


WORKLOADS = (Workload(NAME, "AWD-LSTM", _build, _products, _sizes, _note, (STOCK, DENSE, NR_RH_ST)),)
