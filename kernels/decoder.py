"""An input-feeding attentional decoder over a whole target sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .dispatch import choose
from .kept import Kept
from .steps import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .contract import (
        DecoderGradients,
        DecoderInputs,
        DecoderPatterns,
        DecoderResult,
        DecoderResultGradients,
        DecoderWeights,
        Pattern,
    )


def decodes_at_once(device: torch.device, dtype: torch.dtype) -> bool:
    """The backend for such tensors is faster with :func:`decoder_forward` than with the steps one by one."""
    return choose("lstm", device, dtype, counted=False).decodes_at_once


def decoder_forward(weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns) -> DecoderResult:
    """Stacked LSTM cells with input feed and Luong attention, all target positions in one call.

    At step ``t``: the cells on ``[emb_t, y_{t-1}]``; ``q`` the dropped output of the last; ``a = softmax(q W memoryᵀ)``
    over the first ``lengths`` source positions; ``y_t = drop(tanh([a memory, q] W_out))``.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.

    Source: Luong et al. 2015, sections 3.1 and 3.3; the paper, section 3.2, for what is skipped.
    """
    _check(weights, inputs, patterns)
    return weights.join.backend.decoder_forward(weights, inputs, patterns)


def decoder_backward(
    weights: DecoderWeights,
    inputs: DecoderInputs,
    saved: Any,
    gradients: DecoderResultGradients,
    patterns: DecoderPatterns,
    weights_wanted: bool = True,
) -> DecoderGradients:
    """Gradients of :func:`decoder_forward`; arguments as given to it, ``saved`` as returned by it.

    Args:
        gradients: of its results.
        weights_wanted: compute the gradients of the weights; without it ``cells`` is empty and the others None.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.
    """
    _check(weights, inputs, patterns)
    emb = inputs.emb
    batch, count, hidden = emb.shape[0], emb.shape[1], weights.join.shape[1]
    _check_shape("dy", gradients.y, (batch, count, hidden), emb)
    for name, gradient, value in (("dh_n", gradients.h_n, inputs.h0), ("dc_n", gradients.c_n, inputs.c0)):
        _check_shape(name, gradient, tuple(value.shape), emb)
    if gradients.align is not None:
        _check_shape("dalign", gradients.align, (count, batch, inputs.memory.shape[1]), emb)
    return weights.join.backend.decoder_backward(weights, inputs, saved, gradients, patterns, weights_wanted)


def _check(weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns) -> None:
    emb, memory, lengths, h0, c0, feed0 = inputs
    Steps(1).check("emb", emb)
    batch, count, embed = emb.shape
    hidden, layers = weights.join.shape[1], len(weights.cells)
    if weights.join.shape[0] != 2 * hidden:
        raise ValueError(f"join must be [{2 * hidden}, {hidden}], got {list(weights.join.shape)}")
    if weights.query is not None and weights.query.shape != (hidden, hidden):
        raise ValueError(f"query must be [{hidden}, {hidden}], got {list(weights.query.shape)}")
    if not layers or len(patterns.recurrent) != layers or len(patterns.between) != layers - 1:
        told = f"{len(patterns.recurrent)} recurrent patterns and {len(patterns.between)} between layers"
        raise ValueError(f"{layers} layers take as many recurrent patterns, and one less between them, got {told}")
    if memory.dim() != 3 or (memory.shape[0], memory.shape[2]) != (batch, hidden):
        raise ValueError(f"memory must be [{batch}, S, {hidden}], got {tuple(memory.shape)}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be [{batch}], got {tuple(lengths.shape)}")
    for name, tensor in (("h0", h0), ("c0", c0)):
        _check_shape(name, tensor, (layers, batch, hidden), emb)
    _check_shape("feed", feed0, (batch, hidden), emb)
    for layer, cell in enumerate(weights.cells):
        size = hidden if layer else embed + hidden
        if (cell.input_size, cell.hidden_size) != (size, hidden):
            raise ValueError(f"layer {layer} takes {cell.input_size} inputs, must take {size}")
    operands: list[Any] = [memory, *weights.cells, weights.join, *([weights.query] if weights.query else [])]
    for other in operands:
        if other.dtype != emb.dtype or other.device != emb.device:
            raise TypeError(f"emb is {emb.dtype} on {emb.device}, another operand {other.dtype} on {other.device}")
    _check_pattern(patterns.embedding, count, batch, embed)
    for pattern in (patterns.feed, *patterns.between, *patterns.recurrent, patterns.query, patterns.output):
        _check_pattern(pattern, count, batch, hidden)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, emb {like.dtype} on {like.device}")


def _check_pattern(pattern: Pattern, count: int, batch: int, size: int) -> None:
    if isinstance(pattern, Kept):
        if (pattern.size, pattern.steps) != (size, count):
            told = f"{pattern.steps} steps of {pattern.size}"
            raise ValueError(f"kept units are {told}, the product has {count} of {size}")
    elif pattern is not None and pattern.shape != (count, batch, size):
        raise ValueError(f"a multiplier must be [{count}, {batch}, {size}], got {tuple(pattern.shape)}")
