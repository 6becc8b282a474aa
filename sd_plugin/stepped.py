"""An LSTM layer that is run a step at a time, for decoders whose steps cannot be one operation.

Its weights are packed once, and their gradient is one product over all steps. Autograd would make a gradient of the
weights' size at every step and add it to the others, which costs a small layer more than dropout saves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import _stash, kernels
from ._autocast import cast_for_autocast, without_autocast
from ._compile import opaque
from .functional import LayerCall, Operand, Operation, layer_gradients, once_differentiable, pack_parameters
from .kernels import TIME_MAJOR, Kept, LSTMResultGradients, Steps, Wanted

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels import PackedWeights

State = tuple["Tensor", "Tensor"]
Parameters = tuple["Tensor", "Tensor", "Tensor | None", "Tensor | None"]


@dataclass
class _Finished:
    """What the backward pass of one step leaves for the gradient of the weights.

    Attributes:
        x: ``[B, I]`` its input, and ``input``, the columns that are not zero; None: any.
        h: ``[B, H]`` the state before it, undropped, and ``recurrent``, what the product dropped of it.
        gates: ``[B, 4H]``, gradient of the gates' pre-activations.
    """

    x: Tensor
    input: Kept | None
    h: Tensor
    recurrent: Kept | Tensor | None
    gates: Tensor


class _Gathered:
    """The steps that a backward pass has run, until the gradient of the weights is made of them.

    Backward passes are told apart: one that does not ask for the weights' gradient leaves its steps behind.
    """

    def __init__(self) -> None:
        self._steps: dict[int, list[_Finished]] = {}

    def add(self, step: _Finished) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._steps:
            self._steps[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._discard, task))
        self._steps[task].append(step)

    def _discard(self, task: int) -> None:
        self._steps.pop(task, None)

    def take(self) -> list[_Finished]:
        return self._steps.pop(torch._C._current_graph_task_id())


class _Weights(Operation):
    """Stands between the parameters and the steps.

    Its result holds nothing. Since every step depends on it, autograd runs its backward pass after theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        gathered: _Gathered,
    ) -> Tensor:
        ctx.gathered = gathered
        return weight_ih.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        needs_ih, needs_hh, needs_bias_ih, needs_bias_hh, _ = ctx.needs_input_grad
        # A packed sequence's steps never have more rows than the one before, and a sum does not ask for their order.
        steps = sorted(ctx.gathered.take(), key=lambda step: -step.gates.shape[0])
        rows = tuple(step.gates.shape[0] for step in steps)
        gates = _joined([step.gates for step in steps], rows)
        layout = TIME_MAJOR if gates.dim() == 3 else Steps.packed(rows)
        with without_autocast(gates.device.type):
            weight_ih = _input_product(steps, rows, gates, layout) if needs_ih else None
            weight_hh = _recurrent_product(steps, rows, gates, layout) if needs_hh else None
        bias = gates.flatten(0, -2).sum(0) if needs_bias_ih or needs_bias_hh else None
        # A copy: torch may accumulate into the tensor it is given.
        bias_hh = bias.clone() if needs_bias_hh and bias is not None else None
        return weight_ih, weight_hh, bias if needs_bias_ih else None, bias_hh, None


def _joined(parts: list[Tensor], rows: tuple[int, ...]) -> Tensor:
    """``[B, K]`` of each step as ``[T, B, K]``, or, where steps differ in rows, as packed ``[R, K]``."""
    return torch.stack(parts) if len(set(rows)) == 1 else torch.cat(parts)


def _input_product(steps: list[_Finished], rows: tuple[int, ...], gates: Tensor, layout: Steps) -> Tensor:
    """Gradient ``[4H, I]`` of the input's weight."""
    x = _joined([step.x for step in steps], rows)
    return kernels.gemm_wg(x, gates, _in_time([step.input for step in steps], x), layout).t()


def _recurrent_product(steps: list[_Finished], rows: tuple[int, ...], gates: Tensor, layout: Steps) -> Tensor:
    """Gradient ``[4H, H]`` of the recurrent weight."""
    operands, patterns = [], []
    for step in steps:
        pattern = step.recurrent
        mask = pattern[0, : step.h.shape[0]] if isinstance(pattern, torch.Tensor) else None
        operands.append(step.h if mask is None else step.h * mask)
        patterns.append(pattern if isinstance(pattern, Kept) else None)
    h = _joined(operands, rows)
    return kernels.gemm_wg(h, gates, _in_time(patterns, h), layout).t()


def _in_time(patterns: list[Kept | None], like: Tensor) -> Kept | None:
    """The kept units of all steps; None if no step knows of any."""
    if all(pattern is None for pattern in patterns):
        return None
    everything = Kept.all(1, like.shape[-1], like.device)
    return Kept.in_time([pattern or everything for pattern in patterns])


class _Step(Operation):
    """One step of one layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, token: Tensor, packed: PackedWeights, call: _StepCall
    ) -> tuple[Tensor, Tensor]:
        layer = call.layer
        with without_autocast(x.device.type):
            _, h, c, saved = kernels.lstm_forward(packed, x.unsqueeze(0), (h0, c0), layer.of_kernels())
        _stash.save(ctx, x, h0, token, saved, packed)
        ctx.call = call
        layer.count(x, packed.hidden_size, packed.backend.name, 1)
        return h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
        x, h0, token, saved, packed = _stash.saved(ctx)
        needs_x, _, _, needs_weights, *_ = ctx.needs_input_grad
        layer: LayerCall = ctx.call.layer
        wanted = Wanted(needs_x, False, False, False, gates=needs_weights)
        # The state is all of the output, and its gradient is given once.
        gradients = LSTMResultGradients(torch.zeros_like(dh).unsqueeze(0), dh, dc)
        grads, input = layer_gradients(layer, packed, x.unsqueeze(0), saved, gradients, wanted)
        if grads.gates is not None:
            # Detached: with their own graph they would hold on to this one, through the steps before them.
            finished = _Finished(x.detach(), input, h0.detach(), layer.recurrent.pattern, grads.gates[0])
            ctx.call.gathered.add(finished)
        dx = None if grads.x is None else grads.x[0]
        return dx, grads.h0, grads.c0, torch.zeros_like(token) if needs_weights else None, None, None


@dataclass
class _StepCall:
    """The part of a step's call that is not differentiated."""

    layer: LayerCall
    gathered: _Gathered


class SteppedLayer:
    """An LSTM layer for the steps of one sequence.

    Args:
        parameters: ``weight_ih [4H, I]``, ``weight_hh [4H, H]``, ``bias_ih`` and ``bias_hh`` ``[4H]`` or None, which
            stay as they are, and under the same autocast, until the last step.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.
    """

    @opaque
    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._packed = pack_parameters(parameters)
        self._gathered = _Gathered()
        self._token: Tensor | None = None

    @opaque
    def step(self, x: Tensor, state: State, input: Operand, recurrent: Operand) -> State:
        """Run one step.

        Args:
            x: ``[B, I]``, dropped and scaled already; state: ``h`` and ``c``, ``[B, H]``.
            input, recurrent: patterns of the two products, of one step.

        Returns:
            The next ``h`` and ``c``.

        Raises:
            ValueError: shapes or sizes disagree. TypeError: dtypes or devices disagree.
        """
        x, h, c = cast_for_autocast(x, *state)
        if isinstance(recurrent.pattern, torch.Tensor):
            recurrent.pattern = recurrent.pattern.to(x.dtype)
        # Steps may run without a graph before one that has it: a checkpoint runs them so, and again, one by one.
        if self._token is None or (torch.is_grad_enabled() and not self._token.requires_grad):
            self._token = _Weights.apply(*cast_for_autocast(*self._parameters), self._gathered)
        call = _StepCall(LayerCall(input, recurrent, TIME_MAJOR), self._gathered)
        h, c = _Step.apply(x, h, c, self._token, self._packed, call)
        return h, c
