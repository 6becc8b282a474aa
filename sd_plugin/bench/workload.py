"""What a workload is: a training step for every column, and the matrix products inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..patterns import kept_count
from . import precision as precisions
from .columns import COLUMNS, FP32

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Setup:
    """How workloads are built.

    Attributes:
        device: where everything lives.
        seed: of parameters, data and dropout.
        tiny: shapes for tests of the program, never for results.
        dropout: False sets every probability to 0, so that all columns compute the same.
        hosts: checkouts of host programs by name.
        precision: what forward pass and loss are computed in, of :data:`~sd_plugin.bench.columns.PRECISIONS`; its
            switches (:func:`.precision.settings`) are set by whoever runs the training.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 1
    tiny: bool = False
    dropout: bool = True
    hosts: Mapping[str, Path] = field(default_factory=dict)
    precision: str = FP32

    def autocast(self) -> AbstractContextManager[object]:
        """For the forward pass and the loss."""
        return precisions.autocast(self.precision, self.device)

    def p(self, probability: float) -> float:
        """``probability``, or 0 where dropout is off."""
        return probability if self.dropout else 0.0

    def generator(self) -> torch.Generator:
        """A generator for synthetic data, on the CPU so that every device gets the same data."""
        return torch.Generator().manual_seed(self.seed)


class Training:
    """One column's model, data and optimizer.

    Args:
        model: in training mode, on its device.
        loss: one forward pass over the next batch; a scalar.
        optimizer: of the model's parameters.
        clip: largest norm of all gradients together.
        autocast: makes a context for ``loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        clip: float,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model = model
        self._loss = loss
        self._optimizer = optimizer
        self._clip = clip
        self._autocast = autocast
        self._parameters = list(model.parameters())

    def gradients(self) -> Tensor:
        """Forward, loss and backward, into the parameters' ``grad``; the loss."""
        self._optimizer.zero_grad()
        with self._autocast():
            loss = self._loss()
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        """One whole training step: forward, loss, backward, clip, optimizer. Returns the loss, still on the device."""
        loss = self.gradients()
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        return loss


@dataclass(frozen=True)
class Product:
    """A weight matrix of a workload, as its three products (FP, BP, WG) see it.

    Attributes:
        name: place in the model, as the report's sites.
        rows: rows of the activations at each time step; never increasing (packed) or constant.
        units: ``K``, columns of the input, of which some are dropped.
        outputs: ``N``, columns of the output: 4H of a layer, the vocabulary of a projection.
        stepwise: FP and BP run one step at a time, since each step needs the last one's result.
        dropout: column -> probability of the input's dropout; columns not named drop nothing that can be skipped.
        count: how many such matrices there are.
        of_lstm: of an LSTM layer, whose products cuDNN does in its own precision.
    """

    name: str
    rows: tuple[int, ...]
    units: int
    outputs: int
    stepwise: bool = False
    dropout: Mapping[str, float] = field(default_factory=dict)
    count: int = 1
    of_lstm: bool = False

    def skips(self, column: str) -> bool:
        """Whether the products leave anything out in ``column``."""
        return self.dropout.get(column, 0.0) > 0.0

    def kept(self, column: str) -> int:
        """Units that are kept at each step in ``column``, of ``units``."""
        return kept_count(self.units, self.dropout[column]) if self.skips(column) else self.units

    def describe(self) -> dict[str, Any]:
        """For the JSON file: shapes, and the kept units of the columns that skip."""
        told = asdict(self)
        told["rows"] = list(self.rows) if len(set(self.rows)) > 1 else self.rows[0]
        told["steps"] = len(self.rows)
        told["kept"] = {column: self.kept(column) for column in self.dropout if self.skips(column)}
        return told


@dataclass(frozen=True)
class Workload:
    """One of the paper's systems at its shapes.

    Attributes:
        name: for ``--workload``; title: for tables and figures.
        columns: those it has, of :data:`~sd_plugin.bench.columns.COLUMNS`.
        build: makes the training of a column.
        products: what is multiplied in a step, LSTM layers and projection.
        sizes: shapes and probabilities, for the JSON file.
        note: what a reader must know, such as which stock model was run.
    """

    name: str
    title: str
    build: Callable[[str, Setup], Training]
    products: Callable[[Setup], Sequence[Product]]
    sizes: Callable[[Setup], dict[str, Any]]
    note: Callable[[Setup], str]
    columns: tuple[str, ...] = COLUMNS


def layer_products(
    name: str,
    rows: tuple[int, ...],
    sizes: tuple[int, int],
    input_dropout: Mapping[str, float],
    recurrent_dropout: Mapping[str, float],
    stepwise: bool = False,
    count: int = 1,
) -> list[Product]:
    """The input's and the recurrent products of an LSTM layer.

    Args:
        sizes: input and hidden size.
        stepwise: the input, too, is known one step at a time only (a decoder with input feed).
        count: such layers (directions).
    """
    units, hidden = sizes
    return [
        Product(f"{name}.input", rows, units, 4 * hidden, stepwise, input_dropout, count, True),
        Product(f"{name}.recurrent", rows, hidden, 4 * hidden, True, recurrent_dropout, count, True),
    ]


def cycle(batches: Sequence[Any]) -> Callable[[], Any]:
    """A function that returns the next of ``batches`` at each call, from the start again after the last."""
    position = -1

    def following() -> Any:
        nonlocal position
        position = (position + 1) % len(batches)
        return batches[position]

    return following
