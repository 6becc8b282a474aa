"""One LSTM layer, one direction: one call of the library forward and one backward."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING, NamedTuple

import torch

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

    from ..kept import Kept
    from ..ops import Wanted
    from ..steps import Steps


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


class _Call:
    """The structure of a call, with the tensors that must outlive it."""

    def __init__(
        self,
        packed: PackedLSTM,
        x: Tensor,
        kept_x: Kept | None,
        pattern_h: Kept | Tensor | None,
        steps: Steps,
        reverse: bool,
        saved: Saved,
        h0: Tensor | None,
    ) -> None:
        hidden, inputs = packed.hidden, packed.inputs
        mask = pattern_h.to(x.dtype).contiguous() if isinstance(pattern_h, torch.Tensor) else None
        units_x, indices_x = c_kept(kept_x, inputs)
        units_h, indices_h = c_kept(None if isinstance(pattern_h, torch.Tensor) else pattern_h, hidden)
        self.alive = (packed, x, mask, indices_x, indices_h, saved, h0)
        self.steps = c_steps(x, steps)
        self.structure = CLSTM(
            self.steps, inputs, hidden, reverse,
            pointer(packed.weight_ih), pointer(packed.weight_hh), pointer(packed.bias),
            c_rows(x, steps), units_x, units_h, pointer(mask), pointer(h0), pointer(saved.c0),
            pointer(saved.gates), pointer(saved.cells), pointer(saved.operand),
        )  # fmt: skip


def lstm_forward(
    packed: PackedLSTM,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    kept_x: Kept | None,
    pattern_h: Kept | Tensor | None,
    steps: Steps,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Equations of ``torch.nn.LSTM`` with ``h_{t-1}`` dropped inside its product."""
    dtype, math = x.dtype, opmath(x.dtype)
    x, h0, c0 = adjacent(x.to(math)), h0.to(math).contiguous(), c0.to(math).contiguous()
    hidden, rows = h0.shape[1], x.shape[:-1].numel()
    width = panel_width(math)
    panels = panels_of_layer(hidden, math)
    visited = hidden if pattern_h is None or isinstance(pattern_h, torch.Tensor) else pattern_h.width
    saved = Saved(
        empty(panels, padded_rows(rows, math), width, dtype=math),
        empty(rows, panels * width // 4, dtype=math),
        empty(visited * rows, dtype=math),
        c0,
    )
    y = empty(*x.shape[:-1], hidden, dtype=math)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    call = _Call(packed, x, kept_x, pattern_h, steps, reverse, saved, h0)
    out = CLSTMOut(c_rows(y, steps), pointer(h_n), pointer(c_n))
    function("sd_lstm_forward", math)(torch.get_num_threads(), byref(call.structure), byref(out))
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype), saved


def lstm_backward(
    packed: PackedLSTM,
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    x: Tensor,
    kept_x: Kept | None,
    pattern_h: Kept | Tensor | None,
    steps: Steps,
    reverse: bool,
    saved_tensors: tuple[Tensor, ...],
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """Back-propagation through time of :func:`lstm_forward`: BP per step, WG once over all steps.

    Returns:
        What :class:`sd_plugin.kernels.LSTMGradients` names, in its order.
    """
    dtype, math = x.dtype, opmath(x.dtype)
    x, dy = adjacent(x.to(math)), adjacent(dy.to(math))
    dh_n, dc_n = dh_n.to(math).contiguous(), dc_n.to(math).contiguous()
    hidden, inputs = dh_n.shape[1], x.shape[-1]
    dh0, dc0 = torch.empty_like(dh_n), torch.empty_like(dc_n)
    dx = empty(*x.shape, dtype=math) if wanted.x else None
    dw = empty(4 * hidden, inputs, dtype=math) if wanted.weight_ih else None
    du = empty(4 * hidden, hidden, dtype=math) if wanted.weight_hh else None
    dbias = x.new_empty(4 * hidden) if wanted.bias else None
    dgates = empty(*x.shape[:-1], 4 * hidden, dtype=math) if wanted.gates else None
    call = _Call(packed, x, kept_x, pattern_h, steps, reverse, Saved(*saved_tensors), None)
    grad = CLSTMGrad(
        c_rows(dy, steps), pointer(dh_n), pointer(dc_n),
        CRows() if dx is None else c_rows(dx, steps), pointer(dh0), pointer(dc0),
        pointer(dw), pointer(du), pointer(dbias), CRows() if dgates is None else c_rows(dgates, steps),
    )  # fmt: skip
    function("sd_lstm_backward", math)(torch.get_num_threads(), byref(call.structure), byref(grad))
    grads = (dx, dh0, dc0, dw, du, dbias, dgates)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in grads)
