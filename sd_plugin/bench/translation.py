"""A stand-in for OpenNMT-py's RNN translator where OpenNMT-py is not installed: the same parts, written plainly.

LSTM encoder, decoder of LSTM cells with input feed, Luong's general attention. Tokens are time-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import hints
from ..attentional import attentional_decoder, is_available
from ..cell import StackedStructuredLSTM, SteppedDropout
from ..kernels import Steps
from ..patterns import Case, draw
from .columns import DENSE, NR_RH_ST, SKIPPING, STOCK
from .layers import dropout, linear, lstm

if TYPE_CHECKING:
    from torch import Tensor

    from .opennmt import Sizes

State = tuple["Tensor", "Tensor"]
_BATCH_FIRST = Steps(1)


class StackedLSTM(nn.Module):
    """Stacked ``nn.LSTMCell`` with dropout between them, under the parameter names of OpenNMT-py's class."""

    def __init__(self, num_layers: int, input_size: int, hidden_size: int, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.layers = nn.ModuleList(
            nn.LSTMCell(input_size if layer == 0 else hidden_size, hidden_size) for layer in range(num_layers)
        )

    def start(self, steps: int, batch: int, like: Tensor) -> StackedLSTM:
        """Nothing is drawn or packed before a sequence."""
        return self

    def step(self, t: int, input: Tensor, hidden: State) -> tuple[Tensor, State]:
        """One step: output of the last layer ``[B, H]`` and the new states ``[layers, B, H]``."""
        states: list[State] = []
        for layer, h, c in zip(self.layers, *hidden, strict=True):
            h, c = layer(input if not states else self.dropout(states[-1][0]), (h, c))
            states.append((h, c))
        return states[-1][0], (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))


def _stack(column: str, sizes: Sizes, p: float) -> nn.Module:
    shape = (sizes.layers, sizes.word_vector + sizes.hidden, sizes.hidden)
    if column == STOCK:
        return StackedLSTM(*shape, p)
    only_rh = p if column == NR_RH_ST else 0.0
    mode = "random" if column == DENSE else column
    return StackedStructuredLSTM(*shape, p, recurrent_dropout=only_rh, output_dropout=only_rh, mode=mode)


class Translator(nn.Module):
    """Encoder, attention, decoder and generator of one column.

    NR+RH+ST adds dropouts to the recurrent states and to the LSTM outputs of encoder and decoder, as
    :mod:`sd_plugin.opennmt` does.
    """

    def __init__(self, column: str, sizes: Sizes, p: float) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.source = nn.Embedding(sizes.source, sizes.word_vector)
        self.target = nn.Embedding(sizes.target, sizes.word_vector)
        self.source_dropout = dropout(column, p, "encoder.embeddings")
        self.target_dropout = dropout(column, p, "decoder.embeddings", batch_first=True)
        options: dict[str, Any] = {"output_dropout": p} if column == NR_RH_ST else {}
        self.encoder = lstm(column, sizes.word_vector, hidden, sizes.layers, dropout=p, recurrent_dropout=p, **options)
        self.stack = _stack(column, sizes, p)
        self.query = linear(column, hidden, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False)
        self.output_dropout = nn.Dropout(p)
        self.stock = column == STOCK
        self.case = Case.of(column in SKIPPING, False)
        self.generator = linear(column, hidden, sizes.target)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -sizes.init, sizes.init)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores ``[T, B, V]`` of the words that follow each of ``target`` ``[T, B]``, given ``source`` ``[S, B]``."""
        memory, state = self.encoder(self.source_dropout(self.source(source)))
        # Attention mixes time steps: no product can skip what the encoder's output has dropped.
        memory = hints.waive(memory).transpose(0, 1)
        embedded = self.target_dropout(self.target(target.t()))
        batch, steps, _ = embedded.shape
        run: Any = self.stack.start(steps, batch, embedded)  # type: ignore[operator]
        feed = memory.new_zeros(batch, memory.shape[2])
        if self.stock or not is_available(embedded):
            outputs = self._step_by_step(run, embedded, memory, state, feed)
        else:
            lengths = torch.full((batch,), memory.shape[1], dtype=torch.int32, device=memory.device)
            drop = self._output_dropout(steps, batch, embedded)
            weights = self.query.weight, self.combine.weight
            outputs, _, _ = attentional_decoder(run, embedded, memory, lengths, state, feed, drop, *weights)
        scores: Tensor = self.generator(outputs)
        return scores.transpose(0, 1)

    def _step_by_step(self, run: Any, embedded: Tensor, memory: Tensor, state: State, feed: Tensor) -> Tensor:
        """The decoder's outputs ``[B, T, H]``."""
        batch, steps, _ = embedded.shape
        drop = (lambda t, x: self.output_dropout(x)) if self.stock else self._output_dropout(steps, batch, embedded)
        outputs = []
        for t, word in enumerate(hints.unbind(embedded, _BATCH_FIRST)):
            y, state = run.step(t, hints.cat([word, feed]), state)
            feed = drop(t, self._attend(y, memory))
            outputs.append(feed)
        return hints.stack(outputs, _BATCH_FIRST)

    def _output_dropout(self, steps: int, batch: int, like: Tensor) -> SteppedDropout:
        shape = (steps, batch, self.combine.out_features)
        pattern = draw(self.case, *shape, self.output_dropout.p, device=like.device, dtype=like.dtype)
        return SteppedDropout(pattern, "decoder.output")

    def _attend(self, y: Tensor, memory: Tensor) -> Tensor:
        """Luong's general attention: ``[B, H]`` from the decoder's output and the encoder's ``[B, S, H]``."""
        weights = torch.bmm(self.query(y).unsqueeze(1), memory.transpose(1, 2)).softmax(-1)
        context = torch.bmm(weights, memory).squeeze(1)
        return torch.tanh(self.combine(torch.cat([context, y], 1)))
