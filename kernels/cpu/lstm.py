"""One LSTM layer, one direction: one call of the library forward and one backward."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..contract import LSTMGradients, LSTMResult
from ..kept import Kept
from .gemm import opmath, pack_panels
from .library import (
    CLSTM,
    CLSTMGrad,
    CLSTMOut,
    CRows,
    adjacent,
    c_kept,
    c_rows,
    c_steps,
    function,
    padded_rows,
    panel_width,
    panels_of_layer,
    pointer,
)
from .memory import empty

if TYPE_CHECKING:
    from torch import Tensor

    from ..contract import LSTMCall, LSTMResultGradients, Wanted


class PackedLSTM(NamedTuple):
    """One layer's weights in panels; each panel holds all four gates of some hidden units."""

    weight_ih: Tensor  #: ``[panels, padded I, width]``
    weight_hh: Tensor  #: ``[panels, padded H, width]``
    bias: Tensor | None  #: ``[panels, 1, width]``, the sum of both biases
    inputs: int
    hidden: int


class Saved(NamedTuple):
    """What the backward call needs of the forward call."""

    gates: Tensor  #: ``[panels, padded rows, width]`` i, f, g, o after their non-linearities
    cells: Tensor  #: ``[rows, padded H]`` c_t
    operand: Tensor  #: kept units of h_{t-1}, dropped and scaled, ``[k, rows]`` of each step, one after the other
    c0: Tensor  #: ``[B, H]``


def lstm_pack(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> PackedLSTM:
    """Pack parameters of ``torch.nn.LSTM``'s shapes."""
    math = opmath(weight_ih.dtype)
    biases = [bias.to(math) for bias in (bias_ih, bias_hh) if bias is not None]
    bias = pack_panels(sum(biases[1:], biases[0]).view(-1, 1), True, False) if biases else None
    weights = [pack_panels(adjacent(weight.to(math)), True, False) for weight in (weight_ih, weight_hh)]
    return PackedLSTM(weights[0], weights[1], bias, weight_ih.shape[1], weight_hh.shape[1])


class _Arguments:
    """The structure that the library takes, with the tensors that must outlive it."""

    def __init__(self, packed: PackedLSTM, x: Tensor, h0: Tensor | None, saved: Saved, call: LSTMCall) -> None:
        hidden, inputs, recurrent = packed.hidden, packed.inputs, call.recurrent
        mask = recurrent.to(x.dtype).contiguous() if isinstance(recurrent, torch.Tensor) else None
        kept_input, input_indices = c_kept(call.input, inputs)
        kept_recurrent, recurrent_indices = c_kept(recurrent if isinstance(recurrent, Kept) else None, hidden)
        self.alive = (packed, x, mask, input_indices, recurrent_indices, saved, h0)
        self.steps = c_steps(x, call.steps)
        self.structure = CLSTM(
            self.steps, inputs, hidden, call.reverse,
            pointer(packed.weight_ih), pointer(packed.weight_hh), pointer(packed.bias),
            c_rows(x, call.steps), kept_input, kept_recurrent, pointer(mask), pointer(h0), pointer(saved.c0),
            pointer(saved.gates), pointer(saved.cells), pointer(saved.operand),
        )  # fmt: skip


def lstm_forward(packed: PackedLSTM, x: Tensor, state: tuple[Tensor, Tensor], call: LSTMCall) -> LSTMResult:
    """Equations of ``torch.nn.LSTM`` with ``h_{t-1}`` dropped inside its product."""
    dtype, math = x.dtype, opmath(x.dtype)
    x = adjacent(x.to(math))
    h0, c0 = (tensor.to(math).contiguous() for tensor in state)
    hidden, rows = packed.hidden, x.shape[:-1].numel()
    width = panel_width(math)
    panels = panels_of_layer(hidden, math)
    visited = call.recurrent.width if isinstance(call.recurrent, Kept) else hidden
    saved = Saved(
        empty(panels, padded_rows(rows, math), width, dtype=math),
        empty(rows, panels * width // 4, dtype=math),
        empty(visited * rows, dtype=math),
        c0,
    )
    y = empty(*x.shape[:-1], hidden, dtype=math)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    arguments = _Arguments(packed, x, h0, saved, call)
    out = CLSTMOut(c_rows(y, call.steps), pointer(h_n), pointer(c_n))
    function("sd_lstm_forward", math)(torch.get_num_threads(), byref(arguments.structure), byref(out))
    return LSTMResult(y.to(dtype), h_n.to(dtype), c_n.to(dtype), saved)


def lstm_backward(
    packed: PackedLSTM,
    x: Tensor,
    saved: Saved,
    gradients: LSTMResultGradients,
    call: LSTMCall,
    wanted: Wanted,
) -> LSTMGradients:
    """Back-propagation through time of :func:`lstm_forward`: BP per step, WG once over all steps."""
    dtype, math, steps = x.dtype, opmath(x.dtype), call.steps
    x, dy = adjacent(x.to(math)), adjacent(gradients.y.to(math))
    dh_n, dc_n = gradients.h_n.to(math).contiguous(), gradients.c_n.to(math).contiguous()
    hidden, inputs = packed.hidden, x.shape[-1]
    dh0, dc0 = torch.empty_like(dh_n), torch.empty_like(dc_n)
    dx = empty(*x.shape, dtype=math) if wanted.x else None
    dw = empty(4 * hidden, inputs, dtype=math) if wanted.weight_ih else None
    du = empty(4 * hidden, hidden, dtype=math) if wanted.weight_hh else None
    dbias = x.new_empty(4 * hidden) if wanted.bias else None
    dgates = empty(*x.shape[:-1], 4 * hidden, dtype=math) if wanted.gates else None
    arguments = _Arguments(packed, x, None, saved, call)
    grad = CLSTMGrad(
        c_rows(dy, steps), pointer(dh_n), pointer(dc_n),
        CRows() if dx is None else c_rows(dx, steps), pointer(dh0), pointer(dc0),
        pointer(dw), pointer(du), pointer(dbias), CRows() if dgates is None else c_rows(dgates, steps),
    )  # fmt: skip
    function("sd_lstm_backward", math)(torch.get_num_threads(), byref(arguments.structure), byref(grad))
    dx, dw, du, dbias, dgates = (None if d is None else d.to(dtype) for d in (dx, dw, du, dbias, dgates))
    return LSTMGradients(dx, dh0.to(dtype), dc0.to(dtype), dw, du, dbias, dgates)
