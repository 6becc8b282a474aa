"""One LSTM layer, one direction: a persistent kernel each way, or cuBLAS and a small kernel at every step.

The input's product, its gradient and the weight gradients have all time steps in one call each (see :mod:`.gemm`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..contract import LSTMGradients, LSTMResult
from ..kept import Kept
from . import choices, gemm, tiling
from .driver import Unit, driver, launch
from .packing import by_units
from .precision import Precision, of_recurrence, product
from .rows import Rows, rows_of
from .tiling import COUNTER_STRIDE, THREADS, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from ..contract import LSTMCall, LSTMResultGradients, Pattern, Wanted
    from ..steps import Steps


class PackedLSTM(NamedTuple):
    """One layer's weights; a snapshot."""

    weight_ih: gemm.PackedMatrix  #: ``[I, 4H]``
    recurrent: Tensor  #: ``[H, columns]`` by kept units, the gates of a unit side by side, rounded as operands
    bias: Tensor | None  #: ``[4H]`` float32, the sum of both biases
    hidden: int
    precision: Precision


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    gates: Tensor  #: i, f, g, o of every unit and row after their non-linearities, in the layout of the kernels
    cells: Tensor
    operand: Tensor  #: ``[rows, H]`` h of the step before, dropped and scaled
    c0: Tensor  #: ``[B, H]`` float32
    recurrent: Recurrent
    tile: Tile | None  #: of the persistent kernels; None where steps were done one by one


class Recurrent(NamedTuple):
    """Recurrent dropout as the kernels take it."""

    order: Tensor | None  #: ``[T, count]`` kept units, sorted for the banks of shared memory
    factors: Tensor | None  #: ``[T, H]`` of kept units
    mask: Tensor | None  #: ``[T, B, H]`` float32
    visited: int  #: kept units of a step
    scale: float

    @property
    def per_row(self) -> bool:
        """Rows of the batch are dropped differently."""
        return self.mask is not None

    def factors_at(self, step: int) -> Tensor | None:
        """``[H]`` or ``[B, H]`` multipliers of a step."""
        factors = self.mask if self.mask is not None else self.factors
        return None if factors is None else factors[step]


def lstm_pack(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> PackedLSTM:
    """Pack parameters of ``torch.nn.LSTM``'s shapes: ``[4H, I]``, ``[4H, H]``, ``[4H]`` or None."""
    precision = of_recurrence(weight_hh.dtype)
    # The input's weight is rounded by whatever multiplies it; the recurrent one would be, at every step.
    plain = Precision.STRICT if precision is Precision.TF32 else precision
    inputs = gemm.PackedMatrix(by_units(weight_ih, plain), weight_ih.shape[0])
    recurrent = by_units(weight_hh, precision, groups=4)
    biases = [bias.float() for bias in (bias_ih, bias_hh) if bias is not None]
    bias = sum(biases[1:], biases[0].clone() if len(biases) == 1 else biases[0]) if biases else None
    return PackedLSTM(inputs, recurrent, bias, weight_hh.shape[1], precision)


def recurrent_of(pattern: Pattern, steps: int, hidden: int, precision: Precision) -> Recurrent:
    """A recurrent pattern of ``steps`` steps of ``hidden`` units, sorted for operands of ``precision``.

    Args:
        pattern: kept units ``[T, k]`` with their scale, a multiplier ``[T, B, H]``, or None.
    """
    if pattern is None:
        return Recurrent(None, None, None, hidden, 1.0)
    if isinstance(pattern, torch.Tensor):
        return Recurrent(None, None, pattern.float().contiguous(), hidden, 1.0)
    indices = pattern.indices
    if indices.stride(1) != 1 and pattern.width > 1:
        indices = indices.contiguous()
    order = indices.new_empty(steps, pattern.width)
    factors = torch.empty(steps, hidden, device=indices.device)
    classes = 8 if precision.dtype.itemsize == 2 else 4
    launch(
        Unit("pattern", (("SD_PRECISION", 0),)), "order_kept", indices, steps, THREADS,
        indices, order, factors, float(pattern.scale), indices.stride(0) if steps > 1 else 0, pattern.width, hidden,
        classes, shared=(hidden + THREADS + classes + 3) // 4 * 16,
    )  # fmt: skip
    return Recurrent(order, factors, None, pattern.width, float(pattern.scale))


def _tile(precision: Precision, hidden: int, batch: int, recurrent: Recurrent, like: Tensor) -> Tile | None:
    """The tile of the persistent kernels; None where steps are done one by one."""
    device = driver().properties(like.device)
    tile = tiling.choose(precision, hidden, batch, recurrent.visited, recurrent.order is not None, device)
    return choices.recurrence(tile)


class _Pass(NamedTuple):
    """What both passes of a layer are told."""

    packed: PackedLSTM
    rows: Rows
    recurrent: Recurrent
    reverse: bool

    def arguments(self, tile: Tile) -> tuple[int, ...]:
        """The sizes that both persistent kernels end with."""
        hidden, rows = self.packed.hidden, self.rows
        sizes = (rows.stride, rows.steps, rows.batch, hidden, self.packed.recurrent.shape[1], self.recurrent.visited)
        return (*sizes, tile.parts(hidden), tile.slices(rows.batch), int(self.reverse))


def lstm_forward(packed: PackedLSTM, x: Tensor, state: tuple[Tensor, Tensor], call: LSTMCall) -> LSTMResult:
    """Equations of ``torch.nn.LSTM`` with ``h_{t-1}`` dropped inside its product."""
    hidden, rows = packed.hidden, rows_of(x, call.steps)
    inputs = _inputs(packed, x, call)
    recurrent = recurrent_of(call.recurrent, rows.steps, hidden, packed.precision)
    run = _Pass(packed, rows, recurrent, call.reverse)
    tile = _tile(packed.precision, hidden, rows.batch, recurrent, x)
    h0, c0 = (tensor.float().contiguous() for tensor in state)
    y = packed.recurrent.new_empty(*x.shape[:-1], hidden)
    if tile is None:
        h_n, c_n, gates, cells, operand = _forward_steps(run, inputs, h0, c0, y.view(inputs.shape[0], hidden))
    else:
        h_n, c_n, gates, cells, operand = _forward_persistent(run, tile, inputs, h0, c0, y)
    saved = Saved(gates, cells, operand, c0, recurrent, tile)
    return LSTMResult(y, h_n.to(x.dtype), c_n.to(x.dtype), saved)


def _forward_persistent(
    run: _Pass, tile: Tile, inputs: Tensor, h0: Tensor, c0: Tensor, y: Tensor
) -> tuple[Tensor, ...]:
    """Fills ``y``; returns ``h_n``, ``c_n``, gates, cells and operand."""
    packed, rows, recurrent = run.packed, run.rows, run.recurrent
    hidden, slices, real = packed.hidden, tile.slices(rows.batch), packed.recurrent
    layout = (rows.steps, slices, hidden, tile.batch)
    operand = real.new_empty(inputs.shape[0], hidden)
    gates, cells = inputs.new_empty(*layout, 4), inputs.new_empty(layout)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    exchange = real.new_empty(2, *layout[1:])
    counters = torch.zeros(slices * COUNTER_STRIDE, dtype=torch.int32, device=real.device)
    launch(
        tile.unit(), "lstm_forward", real, tile.parts(hidden) * slices, THREADS,
        packed.recurrent, inputs, packed.bias, h0, c0, recurrent.order, recurrent.factors, recurrent.mask,
        rows.first, rows.active, exchange, counters, y, h_n, c_n, gates, cells, operand,
        recurrent.scale, *run.arguments(tile), cooperative=True,
        shared=tile.forward_shared(hidden, recurrent.visited, recurrent.order is not None),
    )  # fmt: skip
    return h_n, c_n, gates, cells, operand


def _forward_steps(run: _Pass, inputs: Tensor, h0: Tensor, c0: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """As :func:`_forward_persistent`, with a product of cuBLAS at every step."""
    packed, rows, recurrent = run.packed, run.rows, run.recurrent
    hidden, real, precision = packed.hidden, packed.recurrent, packed.precision
    unit, columns = Unit("cell", (("SD_PRECISION", int(precision)),)), real.shape[1]
    operand = real.new_empty(inputs.shape[0], hidden)
    gates, cells = (inputs.new_empty(rows.steps, rows.batch, hidden, n) for n in (4, 2))
    h, c = h0.clone(), c0.clone()
    for step in _order(rows.steps, run.reverse):
        first, n = rows.starts[step], rows.sizes[step]
        grid, stride = -(-n * hidden // THREADS), rows.stride
        launch(
            unit, "cell_operand", real, grid, THREADS,
            h, recurrent.factors_at(step), operand[first:], int(recurrent.per_row), n, hidden, stride,
        )  # fmt: skip
        sums = product(operand[first::stride][:n], real, precision, torch.float32)
        launch(
            unit, "cell_forward", real, grid, THREADS,
            inputs[first:], packed.bias, sums, h, c, y[first:], gates[step], cells[step], n, hidden, columns, stride,
        )  # fmt: skip
    return h, c, gates, cells, operand


def lstm_backward(
    packed: PackedLSTM,
    x: Tensor,
    saved: Saved,
    gradients: LSTMResultGradients,
    call: LSTMCall,
    wanted: Wanted,
) -> LSTMGradients:
    """Back-propagation through time of :func:`lstm_forward`: BP per step, the rest once over all steps."""
    rows, to, precision = rows_of(x, call.steps), x.dtype, packed.precision
    run = _Pass(packed, rows, saved.recurrent, call.reverse)
    through_time = _backward_steps if saved.tile is None else _backward_persistent
    dgates, dh0, dc0, dbias = through_time(
        run,
        saved,
        gradients.y.contiguous().view(x.shape[:-1].numel(), packed.hidden),
        gradients.h_n.float().contiguous(),
        gradients.c_n.float().contiguous(),
    )
    # The operand carries its zeros and its scale.
    kept = call.recurrent.unscaled() if isinstance(call.recurrent, Kept) else None
    operand = saved.operand.view(*x.shape[:-1], packed.hidden)
    dgates = dgates.view(*x.shape[:-1], 4 * packed.hidden)
    return LSTMGradients(
        x=_input_gradient(packed, dgates, call) if wanted.x else None,
        h0=dh0.to(to),
        c0=dc0.to(to),
        weight_ih=_weight_gradient(x, dgates, call.input, call.steps, precision) if wanted.weight_ih else None,
        weight_hh=_weight_gradient(operand, dgates, kept, call.steps, precision) if wanted.weight_hh else None,
        bias=dbias.to(to) if wanted.bias else None,
        gates=dgates if wanted.gates else None,
    )


def _backward_persistent(run: _Pass, saved: Saved, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the gates ``[rows, 4H]``, of the initial state, and of the bias."""
    assert saved.tile is not None
    packed, rows, recurrent, tile = run.packed, run.rows, run.recurrent, saved.tile
    hidden, slices, parts = packed.hidden, tile.slices(rows.batch), tile.parts(packed.hidden)
    dgates = dy.new_empty(dy.shape[0], 4 * hidden)
    dh0, dc0, dbias = torch.empty_like(dh_n), torch.empty_like(dc_n), dh_n.new_empty(slices, 4 * hidden)
    partial = dh_n.new_empty(2, slices, parts, hidden, tile.batch)
    counters = torch.zeros(slices * COUNTER_STRIDE, dtype=torch.int32, device=dy.device)
    launch(
        tile.unit(), "lstm_backward", dy, parts * slices, THREADS,
        packed.recurrent, recurrent.order, recurrent.factors, recurrent.mask, rows.first, rows.active,
        saved.gates, saved.cells, saved.c0, dy, dh_n, dc_n, partial, counters, dgates, dh0, dc0, dbias,
        *run.arguments(tile), cooperative=True,
        shared=tile.backward_shared(hidden, recurrent.visited, recurrent.order is not None),
    )  # fmt: skip
    return dgates, dh0, dc0, dbias[0] if slices == 1 else dbias.sum(0)


def _backward_steps(run: _Pass, saved: Saved, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> tuple[Tensor, ...]:
    """As :func:`_backward_persistent`, with a product of cuBLAS at every step."""
    packed, rows, recurrent = run.packed, run.rows, run.recurrent
    hidden, real, precision = packed.hidden, packed.recurrent, packed.precision
    unit, columns = Unit("cell", (("SD_PRECISION", int(precision)),)), real.shape[1]
    dgates, dsums = dy.new_empty(dy.shape[0], 4 * hidden), dy.new_empty(rows.batch, columns)
    dh, dc = dh_n.clone(), dc_n.clone()
    for step in _order(rows.steps, not run.reverse):
        first, n = rows.starts[step], rows.sizes[step]
        launch(
            unit, "cell_backward", real, -(-n * columns // 4 // THREADS), THREADS,
            saved.gates[step], saved.cells[step], dy[first:], dh, dc, dgates[first:], dsums, n, hidden, columns,
            rows.stride,
        )  # fmt: skip
        through = product(dsums[:n], real.t(), precision, torch.float32)
        launch(
            unit, "cell_receive", real, -(-n * hidden // THREADS), THREADS,
            through, recurrent.factors_at(step), dh, int(recurrent.per_row), n, hidden,
        )  # fmt: skip
    return dgates, dh, dc, dgates.sum(0, dtype=torch.float32)


def _order(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


def _known(kept: Kept | None, phase: choices.Phase, precision: Precision) -> Kept | None:
    """The pattern, where a product has to know it.

    An input that is already zeroed and scaled (scale 1) needs no mask when cuBLAS runs the dense product, and the
    gradient of its dropped columns is then what a dense layer gives.
    """
    if kept is not None and kept.scale == 1.0 and not choices.skips(phase, precision, kept):
        return None
    return kept


def _inputs(packed: PackedLSTM, x: Tensor, call: LSTMCall) -> Tensor:
    """``[rows, 4H]`` float32: the input's part of the gates, without the bias."""
    kept = _known(call.input, "fp", packed.precision)
    sums = gemm.fp(x, packed.weight_ih, kept, call.steps, packed.precision, torch.float32)
    return sums.view(x.shape[:-1].numel(), 4 * packed.hidden)


def _input_gradient(packed: PackedLSTM, dgates: Tensor, call: LSTMCall) -> Tensor:
    """The gradient of the layer's input, from that of the gates."""
    kept = _known(call.input, "bp", packed.precision)
    return gemm.bp(dgates, packed.weight_ih, kept, call.steps, packed.precision)


def _weight_gradient(x: Tensor, dgates: Tensor, kept: Kept | None, steps: Steps, precision: Precision) -> Tensor:
    """``[4H, K]`` of an operand ``[..., K]``."""
    return gemm.wg(x, dgates, _known(kept, "wg", precision), steps, precision).t()
