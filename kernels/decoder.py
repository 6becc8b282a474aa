"""An input-feeding attentional decoder over a whole target sequence, where a backend has it in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .dispatch import choose
from .kept import Kept
from .steps import Steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .ops import PackedMatrix, PackedWeights


def has_decoder(device: torch.device, dtype: torch.dtype) -> bool:
    """The backend for such tensors has :func:`decoder_forward`; without it, run the decoder step by step."""
    backend = choose("lstm", device, dtype, counted=False)
    return hasattr(backend, "decoder_forward")


class DecoderWeights(NamedTuple):
    """What an attentional decoder multiplies by, packed."""

    cells: tuple[PackedWeights, ...]  #: of each layer; the first takes ``[embedding, feed]``, ``[4H, E + H]``
    query: PackedMatrix | None  #: ``[H, H]`` of Luong's general attention; None for dot
    join: PackedMatrix  #: ``[2H, H]``, of ``[context, query]``


@dataclass(frozen=True)
class DecoderPatterns:
    """Kept units of every product of a decoder, ``[T, k]`` each; None: nothing dropped.

    All but the first two may also be multipliers ``[T, B, H]`` (random dropout: nothing is skipped).

    Attributes:
        embedding: columns of the embedding that are not zero; they carry their scale.
        feed: of the previous step's output, for each step; of step 0 those of the initial feed. Unscaled.
        between: dropout of each layer's output but the last, on its way to the next layer; ``layers - 1`` of them.
        recurrent: dropout of each layer's ``h_{t-1}`` inside its product.
        query: dropout of the last layer's output.
        output: dropout of the decoder's output, which is also what is fed back.
    """

    embedding: Kept | None
    feed: Kept | None
    between: tuple[Kept | Tensor | None, ...]
    recurrent: tuple[Kept | Tensor | None, ...]
    query: Kept | Tensor | None
    output: Kept | Tensor | None


class DecoderResult(NamedTuple):
    """What :func:`decoder_forward` returns."""

    y: Tensor  #: ``[B, T, H]`` the decoder's output, dropped
    h_n: Tensor  #: ``[layers, B, H]``
    c_n: Tensor  #: ``[layers, B, H]``
    align: Tensor  #: ``[T, B, S]`` attention over the source, rows summing to one
    saved: Any  #: for :func:`decoder_backward` alone


class DecoderGradients(NamedTuple):
    """What :func:`decoder_backward` returns: gradients in the shapes of what they belong to."""

    emb: Tensor
    memory: Tensor
    h0: Tensor
    c0: Tensor
    feed0: Tensor
    cells: tuple[tuple[Tensor, Tensor, Tensor], ...]  #: ``weight_ih``, ``weight_hh`` and the bias of each layer
    query: Tensor | None  #: ``[H, H]``, as the host's linear layer holds it
    join: Tensor | None  #: ``[H, 2H]``, likewise


def decoder_forward(
    weights: DecoderWeights,
    emb: Tensor,
    memory: Tensor,
    lengths: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    patterns: DecoderPatterns,
) -> DecoderResult:
    """Stacked LSTM cells with input feed and Luong attention, all target positions in one call.

    At step ``t``: the cells on ``[emb_t, y_{t-1}]``; ``q`` the dropped output of the last; ``a = softmax(q W memoryᵀ)``
    over the first ``lengths`` source positions; ``y_t = drop(tanh([a memory, q] W_out))``.

    Args:
        emb: ``[B, T, E]``, dropped and scaled already; memory: ``[B, S, H]``; lengths: ``[B]`` int32.
        state: ``h_0`` and ``c_0`` ``[layers, B, H]``, and the initial feed ``[B, H]``.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.

    Source: Luong et al. 2015, sections 3.1 and 3.3; the paper, section 3.2, for what is skipped.
    """
    _check(weights, emb, memory, lengths, state, patterns)
    backend: Any = weights.join.backend
    return DecoderResult(*backend.decoder_forward(weights, emb, memory, lengths, state, patterns))


def decoder_backward(
    weights: DecoderWeights,
    dy: Tensor,
    dstate: tuple[Tensor, Tensor],
    dalign: Tensor | None,
    emb: Tensor,
    memory: Tensor,
    lengths: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    saved: Any,
    patterns: DecoderPatterns,
    weights_wanted: bool = True,
) -> DecoderGradients:
    """Gradients of :func:`decoder_forward`; arguments as given to it, ``saved`` as returned by it.

    Args:
        dy: ``[B, T, H]``; dstate: gradients of ``h_n`` and ``c_n``; dalign: ``[T, B, S]`` or None.
        weights_wanted: compute the gradients of the weights; without it ``cells`` is empty and the others None.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.
    """
    _check(weights, emb, memory, lengths, state, patterns)
    batch, count, hidden = emb.shape[0], emb.shape[1], weights.join.shape[1]
    _check_shape("dy", dy, (batch, count, hidden), emb)
    for name, gradient, value in zip(("dh_n", "dc_n"), dstate, state, strict=False):
        _check_shape(name, gradient, tuple(value.shape), emb)
    if dalign is not None:
        _check_shape("dalign", dalign, (count, batch, memory.shape[1]), emb)
    backend: Any = weights.join.backend
    grads = backend.decoder_backward(
        weights, dy, dstate, dalign, emb, memory, lengths, state, saved, patterns, weights_wanted
    )
    return DecoderGradients(*grads)


def _check(
    weights: DecoderWeights,
    emb: Tensor,
    memory: Tensor,
    lengths: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    patterns: DecoderPatterns,
) -> None:
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
    for name, tensor in zip(("h0", "c0"), state, strict=False):
        _check_shape(name, tensor, (layers, batch, hidden), emb)
    _check_shape("feed", state[2], (batch, hidden), emb)
    for layer, cell in enumerate(weights.cells):
        inputs = hidden if layer else embed + hidden
        if (cell.input_size, cell.hidden_size) != (inputs, hidden):
            raise ValueError(f"layer {layer} takes {cell.input_size} inputs, must take {inputs}")
    operands: list[Any] = [memory, *weights.cells, weights.join]
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


def _check_pattern(pattern: Kept | Tensor | None, count: int, batch: int, size: int) -> None:
    if isinstance(pattern, Kept):
        if (pattern.size, pattern.steps) != (size, count):
            told = f"{pattern.steps} steps of {pattern.size}"
            raise ValueError(f"kept units are {told}, the product has {count} of {size}")
    elif pattern is not None and pattern.shape != (count, batch, size):
        raise ValueError(f"a multiplier must be [{count}, {batch}, {size}], got {tuple(pattern.shape)}")
