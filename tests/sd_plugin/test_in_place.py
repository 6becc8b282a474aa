"""Modules whose results a program writes into: as after ``nn.Linear`` and ``nn.LSTM``, with the gradients of a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import sd_plugin
from sd_plugin import StackedStructuredLSTM, StructuredDropout, StructuredDropoutLSTM, StructuredLinear, _pays, stats

STEPS, BATCH, UNITS = 3, 4, 8


def _assign(y: Tensor) -> Tensor:
    y[..., 1] = -1
    return y


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda y: y.add_(1),
    "assign": _assign,
    "relu": torch.relu_,
    "squeeze": lambda y: y.unsqueeze_(0).mul_(2),
}


def assert_free(program: Callable[[], list[Tensor]], parameters: list[Tensor]) -> None:
    """Each result can be written, and the gradients are those of writing into a copy."""
    for name, write in WRITES.items():
        for which in range(len(program())):
            gradients = []
            for copied in (False, True):
                torch.manual_seed(0)
                results = program()
                results[which] = write(results[which].clone() if copied else results[which])
                loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in results)
                gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
            for found, right in zip(*gradients, strict=True):
                assert (found is None) == (right is None)
                if found is not None:
                    torch.testing.assert_close(found, right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", ["time-major", "batch-first", "unbatched", "packed"])
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5, "bidirectional": True}])
@pytest.mark.parametrize("output_dropout", [0.0, 0.5])
def test_results_of_the_lstm(options: dict[str, object], output_dropout: float, locked: bool, layout: str) -> None:
    lstm = StructuredDropoutLSTM(
        UNITS, 5, batch_first=layout == "batch-first", recurrent_dropout=0.5, output_dropout=output_dropout,
        locked=locked, dtype=torch.float64, **options,
    )  # fmt: skip
    x = torch.randn((STEPS, UNITS) if layout == "unbatched" else (STEPS, BATCH, UNITS), dtype=torch.float64)
    source = x.requires_grad_()

    def program() -> list[Tensor]:
        if layout == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(source, torch.tensor([3, 2, 2, 1]))
            y, state = lstm(packed)
            return [y.data, *state]
        y, state = lstm(source)
        return [y, *state]

    assert_free(program, [source, *lstm.parameters()])


@pytest.mark.parametrize("pays_from", [0, math.inf], ids=["skipping", "dense"])
def test_results_of_cells_and_of_dropout(pays_from: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pays, "ASKED_FOR", pays_from)
    cells = StackedStructuredLSTM(2, UNITS, 5, dropout=0.5, recurrent_dropout=0.5, output_dropout=0.5).double()
    source = torch.randn(BATCH, UNITS, dtype=torch.float64, requires_grad=True)

    def step() -> list[Tensor]:
        state = (source.new_ones(2, BATCH, 5), source.new_ones(2, BATCH, 5))
        y, (h, c) = cells(StructuredDropout(0.5)(source), state)
        return [y, h, c]

    assert_free(step, [source, *cells.parameters()])
    assert_free(lambda: [StructuredDropout(0.5)(source)], [source])


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("shape", [(STEPS, BATCH), (STEPS * BATCH,), (1, STEPS, BATCH)])
def test_results_of_the_linear_layer(shape: tuple[int, ...], big: bool) -> None:
    """In torch's memory, and, from 1 MiB on, in recycled memory."""
    linear = StructuredLinear(UNITS, 20_000 if big else 5, dtype=torch.float64)
    source = torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64, requires_grad=True)

    def program() -> list[Tensor]:
        return [linear(StructuredDropout(0.5)(source).view(*shape, UNITS))]

    assert_free(program, [source, *linear.parameters()])


def test_what_a_product_still_needs_is_not_written_unseen() -> None:
    """As torch says of its own layers."""
    for layer in (StructuredLinear(UNITS, 5), nn.Linear(UNITS, 5)):
        x = StructuredDropout(0.5)(torch.randn(STEPS, BATCH, UNITS, requires_grad=True))
        y = layer(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    for lstm in (StructuredDropoutLSTM(UNITS, 5, recurrent_dropout=0.5), nn.LSTM(UNITS, 5)):
        x = torch.randn(STEPS, BATCH, UNITS, requires_grad=True) * 1
        y, _ = lstm(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.fixture
def patched() -> Iterator[None]:
    sd_plugin.enable("torch_nn")
    yield
    sd_plugin.disable("torch_nn")


@pytest.mark.usefixtures("patched")
def test_an_unmodified_program_with_in_place_activations_trains() -> None:
    torch.manual_seed(0)
    lstm, dropout = nn.LSTM(UNITS, UNITS, 2, dropout=0.5), nn.Dropout(0.5)
    head = nn.Sequential(nn.Linear(UNITS, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))
    model = nn.ModuleList([lstm, dropout, head])
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    x, target = torch.randn(STEPS, BATCH, UNITS), torch.randint(3, (STEPS * BATCH,))
    for _ in range(30):
        scores = head(dropout(lstm(x)[0]))
        scores += 1
        scores[..., 0] = scores[..., 0].detach()
        loss = nn.functional.cross_entropy(scores.view(-1, 3), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert stats.sites()[f"dropout {UNITS}"].skipped > 0
