"""One LSTM layer, one direction, over a whole sequence: forward and backward in plain torch operations.

The dropped recurrent state acts inside the product only: the emitted ``h_t`` and the cell path ``c_t`` stay
undropped (the paper, section 3.2). The layer's input arrives with its dropped columns already zero and its kept
ones already scaled; its pattern only says which columns to skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..contract import LSTMGradients, LSTMResult, LSTMResultGradients
from .gemm import StepPattern, gemm_bp, gemm_fp, gemm_wg, opmath

if TYPE_CHECKING:
    from torch import Tensor

    from ..contract import LSTMCall, Pattern, Wanted
    from ..steps import Steps


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; rows as in the layer's input."""

    gates: Tensor  #: ``[..., 4H]`` i, f, g, o after their non-linearities
    cells: Tensor  #: ``[..., H]`` c_t
    h_before: Tensor  #: ``[..., H]`` h_{t-1}, undropped
    c_before: Tensor  #: ``[..., H]`` c_{t-1}


class PackedLSTM(NamedTuple):
    """One layer's weights, K-major, so that a dropped unit is one skipped contiguous row in every product."""

    weight_ih_t: Tensor  #: ``[I, 4H]``
    weight_hh_t: Tensor  #: ``[H, 4H]``
    bias: Tensor | None  #: ``[4H]``, the sum of both biases


def lstm_pack(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> PackedLSTM:
    """Pack parameters of ``torch.nn.LSTM``'s shapes (``[4H, I]``, ``[4H, H]``, ``[4H]``) for the products."""
    math = opmath(weight_ih.dtype)
    biases = [bias.to(math) for bias in (bias_ih, bias_hh) if bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    return PackedLSTM(weight_ih.t().to(math).contiguous(), weight_hh.t().to(math).contiguous(), bias)


def _order(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


def lstm_forward(packed: PackedLSTM, x: Tensor, state: tuple[Tensor, Tensor], call: LSTMCall) -> LSTMResult:
    """Equations of ``torch.nn.LSTM`` with ``h_{t-1}`` dropped inside its product."""
    h0, c0 = state
    steps = call.steps
    math = opmath(x.dtype)
    pre = gemm_fp(x.to(math), packed.weight_ih_t, call.input, steps, packed.bias)
    hidden = h0.shape[1]
    rows = [pre.new_empty(*x.shape[:-1], n) for n in (4 * hidden, hidden, hidden, hidden, hidden)]
    gates, cells, h_before, c_before, y = rows
    parts = [steps.split(tensor) for tensor in (pre, *rows)]
    h, c = h0.to(math).clone(), c0.to(math).clone()
    for t in _order(len(parts[0]), call.reverse):
        pre_t, gates_t, cells_t, h_before_t, c_before_t, y_t = (part[t] for part in parts)
        n = pre_t.shape[0]
        h_before_t.copy_(h[:n])
        c_before_t.copy_(c[:n])
        step = StepPattern(call.recurrent, t)
        _activate(pre_t + step.take(h[:n]) @ step.rows(packed.weight_hh_t), gates_t)
        i, f, g, o = gates_t.chunk(4, 1)
        torch.addcmul(i * g, f, c_before_t, out=c[:n])
        torch.mul(o, c[:n].tanh(), out=h[:n])
        cells_t.copy_(c[:n])
        y_t.copy_(h[:n])
    to = x.dtype
    return LSTMResult(y.to(to), h.to(to), c.to(to), Saved(gates, cells, h_before, c_before))


def _activate(pre: Tensor, gates: Tensor) -> None:
    """Write the four gates' non-linearities of ``pre`` ``[n, 4H]`` into ``gates``: sigmoid, tanh for g."""
    hidden = pre.shape[1] // 4
    torch.sigmoid(pre, out=gates)
    torch.tanh(pre[:, 2 * hidden : 3 * hidden], out=gates[:, 2 * hidden : 3 * hidden])


def lstm_backward(
    packed: PackedLSTM,
    x: Tensor,
    saved: Saved,
    gradients: LSTMResultGradients,
    call: LSTMCall,
    wanted: Wanted,
) -> LSTMGradients:
    """Back-propagation through time of :func:`lstm_forward`: BP per step, WG once over all steps."""
    math, to, steps = opmath(x.dtype), x.dtype, call.steps
    dpre, dh0, dc0 = _backward_through_time(
        packed.weight_hh_t, LSTMResultGradients(*(gradient.to(math) for gradient in gradients)), call, saved
    )
    return LSTMGradients(
        x=gemm_bp(dpre, packed.weight_ih_t, call.input, steps).to(to) if wanted.x else None,
        h0=dh0.to(to),
        c0=dc0.to(to),
        weight_ih=gemm_wg(x.to(math), dpre, call.input, steps).t().to(to) if wanted.weight_ih else None,
        weight_hh=_recurrent_weight_gradient(saved.h_before, dpre, call.recurrent, steps).t().to(to)
        if wanted.weight_hh
        else None,
        bias=dpre.flatten(0, -2).sum(0).to(to) if wanted.bias else None,
        gates=dpre.to(to) if wanted.gates else None,
    )


def _backward_through_time(
    weight_hh_t: Tensor, gradients: LSTMResultGradients, call: LSTMCall, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates' pre-activations ``[..., 4H]`` and of the initial state ``[B, H]``."""
    dpre = torch.empty_like(saved.gates)
    parts = [call.steps.split(tensor) for tensor in (gradients.y, dpre, saved.gates, saved.cells, saved.c_before)]
    dh, dc = gradients.h_n.clone(), gradients.c_n.clone()
    for t in _order(len(parts[0]), not call.reverse):
        dy_t, dpre_t, gates_t, cells_t, c_before_t = (part[t] for part in parts)
        n = dy_t.shape[0]
        i, f, g, o = gates_t.chunk(4, 1)
        di, df, dg, do = dpre_t.chunk(4, 1)
        dh_t, tanh_c = dy_t + dh[:n], cells_t.tanh()
        dc_t = dc[:n] + dh_t * o * (1 - tanh_c * tanh_c)
        di.copy_(dc_t * g * i * (1 - i))
        df.copy_(dc_t * c_before_t * f * (1 - f))
        dg.copy_(dc_t * i * (1 - g * g))
        do.copy_(dh_t * tanh_c * o * (1 - o))
        dc[:n] = dc_t * f
        step = StepPattern(call.recurrent, t)
        dh[:n] = 0
        step.put(dh[:n], dpre_t @ step.rows(weight_hh_t).t())
    return dpre, dh, dc


def _recurrent_weight_gradient(h_before: Tensor, dpre: Tensor, pattern: Pattern, steps: Steps) -> Tensor:
    """``[H, 4H]`` gradient of the recurrent weight, over all steps."""
    if not isinstance(pattern, torch.Tensor):
        return gemm_wg(h_before, dpre, pattern, steps)
    dropped = [h_t * pattern[t, : h_t.shape[0]] for t, h_t in enumerate(steps.split(h_before))]
    grads = steps.split(dpre)
    if not grads:
        return dpre.new_zeros(h_before.shape[-1], dpre.shape[-1])
    return torch.cat(dropped).t() @ torch.cat(grads)
