"""The public kernels: arguments checked once, then the backend that :mod:`.dispatch` chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .contract import (
    LSTMCall,
    LSTMGradients,
    LSTMResult,
    LSTMResultGradients,
    PackedMatrix,
    PackedWeights,
    Wanted,
)
from .dispatch import choose_for
from .kept import Kept
from .steps import TIME_MAJOR, Steps
from .storage import has_memory

if TYPE_CHECKING:
    from torch import Tensor

    from .contract import Pattern

_PLAIN, _EVERYTHING = LSTMCall(), Wanted()


def kept_lists(noise: Tensor, count: int | None, p: float, scale: float) -> tuple[Tensor, Tensor | None]:
    """Kept units from uniform noise of [0, 1).

    Args:
        noise: ``[T, H]``.
        count: units kept at every step, those with the most noise; None keeps every unit of at least ``p``.
        scale: factor on kept units.

    Returns:
        ``[T, count]`` int32, ascending; without a count rows end in entries ``H``, and are as long as the longest, or,
        where to know that would be to wait for the device, ``H``. And ``[T, H]`` float32, ``scale`` where a unit is
        kept and zero elsewhere, if the backend makes it on the way.

    Raises:
        ValueError: ``noise`` has other dimensions, or fewer units than ``count``.
    """
    if noise.dim() != 2 or (count is not None and not 0 <= count <= noise.shape[1]):
        raise ValueError(f"need noise [T, H] with H >= count, got {tuple(noise.shape)} and {count}")
    backend = choose_for("kept_lists", noise, counted=False)
    return backend.kept_lists(noise, count, p, scale)


def gemm_pack(weight_t: Tensor) -> PackedMatrix:
    """Lay a weight out once for several :func:`gemm_fp` and :func:`gemm_bp`.

    Args:
        weight_t: ``[K, N]``, K-major; any strides (the transposed view of a contiguous ``[N, K]`` is not copied first).

    Raises:
        ValueError: it is not a matrix.
    """
    if weight_t.dim() != 2:
        raise ValueError(f"weight_t must be [K, N], got shape {tuple(weight_t.shape)}")
    return _packed("gemm_fp", weight_t)


def gemm_fp(
    x: Tensor,
    weight_t: Tensor | PackedMatrix,
    kept: Kept | None = None,
    steps: Steps = TIME_MAJOR,
    bias: Tensor | None = None,
) -> Tensor:
    """Forward product with a column-sparse input: ``y_t = scale · x_t[:, kept_t] @ weight_t[kept_t, :] + bias``.

    Columns of ``x`` that are not kept are not read: they count as zero whatever they hold.

    Args:
        x: ``[T, B, K]`` (or as ``steps`` says), any floating dtype, any strides.
        weight_t: ``[K, N]``, K-major, same dtype and device, or packed by :func:`gemm_pack`.
        kept: kept units ``[T, k]`` of ``K``; None multiplies densely.
        steps: which rows belong to which time step.
        bias: ``[N]`` or None.

    Returns:
        ``[T, B, N]`` (or as ``steps`` says). Half types are accumulated in float32.

    Raises:
        ValueError: shapes, steps or sizes disagree. TypeError: dtypes or devices disagree.

    Source: the paper, section 3.2, forward pass.
    """
    steps.check("x", x)
    _check_columns("x", x, weight_t, 0)
    _check_kept("kept", kept, steps.count(x), weight_t.shape[0], x)
    if bias is not None:
        if bias.shape != weight_t.shape[1:]:
            raise ValueError(f"bias must be [{weight_t.shape[1]}], got {tuple(bias.shape)}")
        _check_same_kind("bias", bias, x)
    packed = _packed("gemm_fp", weight_t)
    return packed.backend.gemm_fp(x, packed.data, kept, steps, bias)


def gemm_bp(dy: Tensor, weight_t: Tensor | PackedMatrix, kept: Kept | None = None, steps: Steps = TIME_MAJOR) -> Tensor:
    """Input gradient, column-sparse output: ``dx_t[:, kept_t] = scale · dy_t @ weight_t[kept_t, :].T``, else zero.

    Args:
        dy: ``[T, B, N]`` (or as ``steps`` says).
        weight_t: ``[K, N]``, K-major, or packed by :func:`gemm_pack`.
        kept: kept units ``[T, k]`` of ``K``; None multiplies densely.
        steps: which rows belong to which time step.

    Returns:
        ``[T, B, K]`` (or as ``steps`` says).

    Raises:
        ValueError: shapes, steps or sizes disagree. TypeError: dtypes or devices disagree.

    Source: the paper, section 3.2, backward pass.
    """
    steps.check("dy", dy)
    _check_columns("dy", dy, weight_t, 1)
    _check_kept("kept", kept, steps.count(dy), weight_t.shape[0], dy)
    packed = _packed("gemm_bp", weight_t)
    return packed.backend.gemm_bp(dy, packed.data, kept, steps)


def gemm_wg(x: Tensor, dy: Tensor, kept: Kept | None = None, steps: Steps = TIME_MAJOR) -> Tensor:
    """Weight gradient, row-sparse output: ``dweight_t[kept_t, :] += scale · x_t[:, kept_t].T @ dy_t`` over ``t``.

    Args:
        x: ``[T, B, K]`` and dy: ``[T, B, N]`` (or as ``steps`` says).
        kept: kept units ``[T, k]`` of ``K``; None multiplies densely.
        steps: which rows belong to which time step.

    Returns:
        ``[K, N]``, K-major.

    Raises:
        ValueError: shapes, steps or sizes disagree. TypeError: dtypes or devices disagree.

    Source: the paper, section 3.2, weight-gradient computation.
    """
    steps.check("x", x)
    steps.check("dy", dy)
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x {tuple(x.shape)} and dy {tuple(dy.shape)} differ in rows")
    _check_same_kind("dy", dy, x)
    _check_kept("kept", kept, steps.count(x), x.shape[-1], x)
    return choose_for("gemm_wg", x).gemm_wg(x, dy, kept, steps)


def cross_entropy_forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, ``(1 - s) · -log p[target] + s · mean(-log p)`` with ``p`` the row's softmax.

    Args:
        logits: ``[R, V]``; target: ``[R]`` int64, each a column or ``ignore_index``, whose row's loss is zero.

    Returns:
        The loss ``[R]``, and the logarithm of each row's sum of exponentials, for :func:`cross_entropy_backward`.

    Raises:
        ValueError: shapes disagree. IndexError: a target is no column (on a GPU the device stops, as for torch's
            own). TypeError: dtypes or devices disagree.

    Source: ``torch.nn.CrossEntropyLoss`` with ``reduction="none"``.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"need logits [R, V] and target [R], got {tuple(logits.shape)} and {tuple(target.shape)}")
    if logits.shape[1] == 0:
        raise ValueError(f"need at least one column, got logits {tuple(logits.shape)}")
    if target.dtype != torch.int64 or target.device != logits.device:
        raise TypeError(f"target must be int64 on {logits.device}, got {target.dtype} on {target.device}")
    columns = logits.shape[1]
    # Elsewhere the kernel looks: to ask here would be to wait for the device.
    if target.device.type == "cpu" and has_memory(target):
        wrong = (target != ignore_index) & ((target < 0) | (target >= columns))
        if wrong.any():
            raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")
    backend = choose_for("cross_entropy", logits)
    return backend.cross_entropy_forward(logits, target, ignore_index, label_smoothing)


def cross_entropy_backward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, lse: Tensor, scale: Tensor
) -> Tensor:
    """Gradient of :func:`cross_entropy_forward`: ``[R, V]``, from that of each row's loss, ``scale`` ``[R]``.

    Raises:
        ValueError: ``lse`` or ``scale`` is not ``[R]``.
    """
    for name, tensor in (("lse", lse), ("scale", scale)):
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{logits.shape[0]}], got {tuple(tensor.shape)}")
    backend = choose_for("cross_entropy", logits)
    return backend.cross_entropy_backward(logits, target, ignore_index, label_smoothing, lse, scale)


def lstm_pack(
    weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None = None, bias_hh: Tensor | None = None
) -> PackedWeights:
    """Lay one layer's parameters out for :func:`lstm_forward` and :func:`lstm_backward`.

    Args:
        weight_ih: ``[4H, I]``, weight_hh: ``[4H, H]``, bias_ih and bias_hh: ``[4H]`` or None, as
            ``torch.nn.LSTM`` holds them (gates i, f, g, o).

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.
    """
    if weight_hh.dim() != 2 or weight_hh.shape[0] != 4 * weight_hh.shape[1]:
        raise ValueError(f"weight_hh must be [4H, H], got {tuple(weight_hh.shape)}")
    hidden = weight_hh.shape[1]
    if weight_ih.dim() != 2 or weight_ih.shape[0] != 4 * hidden:
        raise ValueError(f"weight_ih must be [{4 * hidden}, I], got {tuple(weight_ih.shape)}")
    _check_same_kind("weight_hh", weight_hh, weight_ih)
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None and bias.shape != (4 * hidden,):
            raise ValueError(f"{name} must be [{4 * hidden}], got {tuple(bias.shape)}")
        if bias is not None:
            _check_same_kind(name, bias, weight_ih)
    backend = choose_for("lstm", weight_ih)
    data = backend.lstm_pack(weight_ih, weight_hh, bias_ih, bias_hh)
    return PackedWeights(backend, data, weight_ih.shape[1], hidden, weight_ih.dtype, weight_ih.device)


def lstm_forward(packed: PackedWeights, x: Tensor, state: tuple[Tensor, Tensor], call: LSTMCall = _PLAIN) -> LSTMResult:
    """One LSTM layer, one direction, over a sequence, skipping dropped units in both products.

    ``gates_t = x_t[:, input[t]] W_ih + drop_t(h_{t-1}) W_hh + b``; ``c_t`` and the emitted ``h_t`` stay undropped.

    Args:
        packed: the layer's weights from :func:`lstm_pack`.
        x: ``[T, B, I]`` (or as ``call.steps`` says), already dropped and scaled.
        state: ``h_0`` and ``c_0``, ``[B, H]``, rows in the order of ``x`` (packed data: longest first).
        call: what is dropped, which rows belong to which time step, and the direction.

    Raises:
        ValueError: shapes, steps or sizes disagree. TypeError: dtypes or devices disagree.

    Source: the paper, equations 1-4 and section 3.2; ``torch.nn.LSTM`` for the cell.
    """
    h0, c0 = state
    _check_lstm(packed, x, call, ("h0", h0), ("c0", c0))
    return packed.backend.lstm_forward(packed.data, x, state, call)


def lstm_backward(
    packed: PackedWeights,
    x: Tensor,
    saved: Any,
    gradients: LSTMResultGradients,
    call: LSTMCall = _PLAIN,
    wanted: Wanted = _EVERYTHING,
) -> LSTMGradients:
    """Gradients of :func:`lstm_forward`; ``packed``, ``x`` and ``call`` as given to it, ``saved`` as returned by it.

    Args:
        gradients: of its results.
        wanted: what to compute.

    Raises:
        ValueError: shapes, steps or sizes disagree. TypeError: dtypes or devices disagree.
    """
    _check_lstm(packed, x, call, ("dh_n", gradients.h_n), ("dc_n", gradients.c_n))
    rows = (*x.shape[:-1], packed.hidden_size)
    if gradients.y.shape != rows:
        raise ValueError(f"dy must be {list(rows)}, got {tuple(gradients.y.shape)}")
    _check_same_kind("dy", gradients.y, x)
    return packed.backend.lstm_backward(packed.data, x, saved, gradients, call, wanted)


def _check_lstm(packed: PackedWeights, x: Tensor, call: LSTMCall, *states: tuple[str, Tensor]) -> None:
    """Raise unless ``x``, its patterns and the named ``[B, H]`` states fit each other and the weights."""
    call.steps.check("x", x)
    if x.shape[-1] != packed.input_size:
        raise ValueError(f"x has {x.shape[-1]} columns, the weights take {packed.input_size}")
    if x.dtype != packed.dtype or x.device != packed.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, the weights {packed.dtype} on {packed.device}")
    count, batch = call.steps.count(x), call.steps.batch(x)
    for name, state in states:
        if state.shape != (batch, packed.hidden_size):
            raise ValueError(f"{name} must be [{batch}, {packed.hidden_size}], got {tuple(state.shape)}")
        _check_same_kind(name, state, x)
    _check_kept("input", call.input, count, packed.input_size, x)
    _check_recurrent(call.recurrent, count, batch, packed.hidden_size, x)


def _packed(operation: str, weight_t: Tensor | PackedMatrix) -> PackedMatrix:
    if isinstance(weight_t, PackedMatrix):
        return weight_t
    backend = choose_for(operation, weight_t)
    shape = (weight_t.shape[0], weight_t.shape[1])
    return PackedMatrix(backend, backend.gemm_pack(weight_t), shape, weight_t.dtype, weight_t.device)


def _check_columns(name: str, x: Tensor, weight_t: Tensor | PackedMatrix, dim: int) -> None:
    if len(weight_t.shape) != 2:
        raise ValueError(f"weight_t must be [K, N], got shape {tuple(weight_t.shape)}")
    if x.shape[-1] != weight_t.shape[dim]:
        raise ValueError(f"{name} has {x.shape[-1]} columns, weight_t is {tuple(weight_t.shape)}")
    _check_same_kind("weight_t", weight_t, x)


def _check_same_kind(name: str, tensor: Tensor | PackedMatrix, like: Tensor) -> None:
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, the other operand {like.dtype} on {like.device}")


def _check_kept(name: str, kept: Kept | None, count: int, size: int, x: Tensor) -> None:
    if kept is None:
        return
    if kept.size != size:
        raise ValueError(f"{name} is of {kept.size} units, the product has {size}")
    if kept.steps != count:
        raise ValueError(f"{name} has {kept.steps} time steps, the activations have {count}")
    if kept.indices.device != x.device:
        raise TypeError(f"{name} is on {kept.indices.device}, the activations on {x.device}")


def _check_recurrent(pattern: Pattern, count: int, batch: int, hidden: int, x: Tensor) -> None:
    if pattern is None or isinstance(pattern, Kept):
        _check_kept("recurrent", pattern, count, hidden, x)
    elif pattern.shape != (count, batch, hidden):
        raise ValueError(f"recurrent must be [{count}, {batch}, {hidden}], got {tuple(pattern.shape)}")
    else:
        _check_same_kind("recurrent", pattern, x)
