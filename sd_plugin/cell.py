"""A stack of LSTM cells run step by step, for decoders that feed their output back into their input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import _check, _report, hints
from ._pays import step_pays
from .dropout import StructuredDropout
from .functional import Operand
from .hints import Draw, Part
from .kernels import Kept, Steps
from .lstm import check_mode, with_dropout_mode
from .patterns import Case, check_probability, check_sampling, draw
from .stepped import SteppedLayer

if TYPE_CHECKING:
    from torch import Tensor

State = tuple["Tensor", "Tensor"]


class StackedStructuredLSTM(nn.Module):
    """Stacked ``nn.LSTMCell`` whose products skip dropped units; parameter names of OpenNMT-py's ``StackedLSTM``.

    Args:
        num_layers: number of cells; input_size, hidden_size: their sizes.
        dropout: probability between layers, held in ``self.dropout.p`` and changeable there.
        recurrent_dropout: probability for each layer's :math:`h_{t-1}`, inside the product.
        output_dropout: probability for the last layer's output.
        mode, sampling: as :class:`~sd_plugin.StructuredDropoutLSTM`.
        site: prefix of its sites in the report.
        layers: the ``nn.LSTMCell`` to use; new ones when None.

    Shape:
        input ``[B, input_size]``, states ``[num_layers, B, H]``, output ``[B, H]``. Of more states the first ones are
        used, as in OpenNMT-py's ``StackedLSTM``, whose encoder may have more layers than its decoder.

    Raises:
        ValueError: as :class:`~sd_plugin.StructuredDropoutLSTM`.
    """

    def __init__(
        self,
        num_layers: int,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        output_dropout: float = 0.0,
        mode: str = "nr_rh_st",
        sampling: str = "exact",
        site: str = "cell",
        layers: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.dropout_mode = check_mode(mode)
        if mode == "nr_st" and recurrent_dropout:
            raise ValueError("mode nr_st has no recurrent dropout; use nr_rh_st, or recurrent_dropout=0")
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.recurrent_dropout = check_probability(recurrent_dropout, "recurrent_dropout")
        self.output_dropout = check_probability(output_dropout, "output_dropout")
        self.sampling = check_sampling(sampling)
        self.site = site
        self.dropout = StructuredDropout(dropout, self.case, sampling=sampling, site=f"{site}.between")
        self.layers = layers or nn.ModuleList(
            nn.LSTMCell(input_size if layer == 0 else hidden_size, hidden_size) for layer in range(num_layers)
        )

    @property
    def case(self) -> Case:
        """The case of Fig. 1 that ``dropout_mode`` amounts to."""
        return Case.of(self.dropout_mode != "random", False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_dropout_mode(state))

    @classmethod
    def _check_to_stock(cls, name: str) -> None:
        """TypeError unless the stock class can be had; ``name`` is the module's in its model."""
        try:
            _opennmt_stack()
        except ImportError as error:
            raise TypeError(
                f"{name or 'the model'} is a {cls.__name__}, whose stock class is the StackedLSTM of OpenNMT-py, "
                f"which cannot be imported: {error}"
            ) from error

    def _to_stock(self) -> None:
        self.__class__ = _opennmt_stack()
        for name in ("dropout_mode", "hidden_size", "recurrent_dropout", "output_dropout", "sampling", "site"):
            del self.__dict__[name]

    def own_states(self, hidden: State) -> State:
        """The states of this stack's layers: the first ``num_layers`` of ``hidden``.

        Raises:
            IndexError: there are fewer.
        """
        if len(hidden[0]) < self.num_layers:
            raise IndexError(f"hidden has the states of {len(hidden[0])} layers, and there are {self.num_layers}")
        return hidden[0][: self.num_layers], hidden[1][: self.num_layers]

    def start(self, steps: int, batch: int, like: Tensor) -> StackedRun:
        """Draw the patterns of a whole sequence and pack the weights once for it.

        Args:
            steps: number of time steps that will be run; batch: rows of each.
            like: gives device and dtype.
        """
        return StackedRun(self, steps, batch, like)

    def forward(self, input: Tensor, hidden: State) -> tuple[Tensor, State]:
        """One step alone, as OpenNMT-py's ``StackedLSTM``: output of the last layer and the new states."""
        if self.training:
            return self.start(1, input.shape[0], input).step(0, input, hidden)
        states = []
        for layer, h, c in zip(self.layers, *self.own_states(hidden), strict=True):
            states.append(layer(input, (h, c)))
            input = states[-1][0]
        return input, (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))


def _opennmt_stack() -> Any:
    from onmt.modules.stacked_rnn import StackedLSTM

    return StackedLSTM


class StackedRun:
    """One training pass of a :class:`StackedStructuredLSTM` over a sequence, a step at a time.

    Attributes:
        parameters: ``weight_ih``, ``weight_hh``, ``bias_ih`` and ``bias_hh`` of each layer, an ``nn.LSTMCell``.
        skips: its steps' products skip what is dropped. False where that does not pay (:mod:`._pays`) and for random
            dropout: torch's own cells then multiply what is dropped as everything else.
    """

    def __init__(self, stack: StackedStructuredLSTM, steps: int, batch: int, like: Tensor) -> None:
        self._stack = stack
        self._steps, self._batch, self._device, self._dtype = steps, batch, like.device, like.dtype
        self.parameters = [_parameters_of(cell) for cell in stack.layers]
        weights = sum(weight.numel() for parameters in self.parameters for weight in parameters[:2])
        pays = _check.ENABLED or step_pays(batch * weights, like.device)
        self.skips = stack.dropout_mode != "random" and pays
        self._layers: list[SteppedLayer] = []
        self._has_begun = False
        site = stack.site
        self._recurrent = [
            self._dropout(stack.recurrent_dropout, f"{site}.l{layer}.recurrent") for layer in range(stack.num_layers)
        ]
        self._between = [self._dropout(stack.dropout.p, stack.dropout.site) for _ in stack.layers[1:]]
        self._output = self._dropout(stack.output_dropout, f"{site}.output")

    def _dropout(self, p: float, site: str) -> SteppedDropout:
        stack = self._stack
        sizes = (self._steps, self._batch, stack.hidden_size)
        pattern = draw(stack.case, *sizes, p, sampling=stack.sampling, device=self._device, dtype=self._dtype)
        return SteppedDropout(pattern, site, self.skips)

    def operands(self, output: SteppedDropout) -> tuple[list[Operand], list[Operand], Operand, Operand]:
        """The whole sequence's patterns, for a product over all steps at once, instead of :meth:`step`.

        Returns:
            Those of each layer's recurrent product, between the layers, of the last layer, and of ``output``.
        """
        recurrent = [dropout.operand() for dropout in self._recurrent]
        return recurrent, [dropout.operand() for dropout in self._between], self._output.operand(), output.operand()

    def step(self, t: int, input: Tensor, hidden: State) -> tuple[Tensor, State]:
        """Run step ``t``: output of the last layer, dropped, and the new states.

        Args:
            input: ``[B, input_size]``, dropped already; its hint, if any, is of one step.
            hidden: ``h`` and ``c``, ``[num_layers, B, H]``, or of more layers.

        Returns:
            ``[B, H]``, with its hint, and ``h`` and ``c``, ``[num_layers, B, H]``.
        """
        if not self._has_begun:
            self._begin()
        states = []
        for layer, (h, c) in enumerate(zip(*self._stack.own_states(hidden), strict=True)):
            h, c = self._cell(layer, t, input, (h, c))
            states.append((h, c))
            input = self._between[layer](t, h) if layer < len(self._between) else self._output(t, h)
        return input, (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))

    def _begin(self) -> None:
        """Before the step that is run first: weights are packed, or it is told that nothing will be skipped."""
        self._has_begun = True
        if self.skips:
            self._layers = [SteppedLayer(parameters) for parameters in self.parameters]
            return
        dropouts = (*self._recurrent, *self._between, self._output)
        for dropout in dropouts:
            dropout.waive()
        if any(isinstance(dropout.pattern, Kept) for dropout in dropouts):
            units = f"{self._stack.hidden_size} units"
            _report.count("sequences of cell steps that would not gain from skipping", units)

    def _cell(self, layer: int, t: int, x: Tensor, state: State) -> State:
        if not self.skips:
            hints.waive(x)
            h, c = state
            return torch.lstm_cell(x, (self._recurrent[layer](t, h), c), *self.parameters[layer])
        hint = hints.lookup(x)
        operand = Operand.hinted(hint if hint is not None and hint.kept.steps == 1 else None, x)
        return self._layers[layer].step(x, state, operand, self._recurrent[layer].operand_at(t))


def _parameters_of(cell: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


class SteppedDropout:
    """A dropout whose pattern is drawn for a whole sequence and applied one step at a time.

    Args:
        pattern: kept units, a multiplier ``[T, B, K]``, or None (nothing dropped).
        site: name in the report.
        hinted: each step's result carries its hint; without, only :meth:`stack` of all does.
    """

    def __init__(self, pattern: Kept | Tensor | None, site: str, hinted: bool = True) -> None:
        self.pattern = pattern
        self.site = site
        self.hinted = hinted
        self._multipliers: tuple[Tensor, ...] = ()

    def operand(self) -> Operand:
        """The whole sequence's pattern as the operand of a product that drops, used at once."""
        return Operand.drawn(self.pattern, self.site)

    def operand_at(self, t: int) -> Operand:
        """The pattern of step ``t``, likewise."""
        pattern = self.pattern
        at_t = pattern.at(t) if isinstance(pattern, Kept) else None if pattern is None else pattern[t : t + 1]
        return Operand.drawn(at_t, self.site)

    def __call__(self, t: int, x: Tensor) -> Tensor:
        """``x`` ``[B, K]`` dropped as at step ``t``."""
        if self.pattern is None:
            return x
        if not isinstance(self.pattern, Kept):
            return x * self.pattern[t]
        self._multipliers = self._multipliers or self.pattern.multiplier(x.dtype).unbind()
        if not self.hinted:
            return x * self._multipliers[t]
        kept = self.pattern.at(t)
        part = Part(kept, [Draw(self.site, kept)])
        return hints.attach(x * self._multipliers[t], [part], Steps.packed(x.shape[:1]))

    def stack(self, results: list[Tensor], steps: Steps) -> Tensor:
        """What it made of each step, ``[B, K]``, stacked along the time dimension of ``steps``, with the hint."""
        if self.hinted or not isinstance(self.pattern, Kept):
            return hints.stack(results, steps)
        part = Part(self.pattern, [Draw(self.site, self.pattern)])
        return hints.attach(torch.stack(results, steps.time_dim), [part], steps)

    def waive(self) -> None:
        """Count the pattern as one that no product can make use of."""
        if isinstance(self.pattern, Kept):
            Draw(self.site, self.pattern).waive()
