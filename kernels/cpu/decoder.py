"""The input-feeding decoder over a whole target sequence: one call of the library forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..contract import DecoderGradients, DecoderResult
from ..kept import Kept
from ..steps import Steps
from .gemm import opmath
from .library import (
    CDecoder,
    CDecoderGrad,
    CDecoderOut,
    CKept,
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

    from ..contract import DecoderInputs, DecoderPatterns, DecoderResultGradients, DecoderWeights, Pattern

_BATCH_FIRST = Steps(1)


class Saved(NamedTuple):
    """What the backward call needs of the forward call; of each layer, then of the attention."""

    gates: list[Tensor]
    cells: list[Tensor]
    operand: list[Tensor]
    input: list[Tensor]
    query: Tensor  #: kept units, ``[k, B]`` of each step
    scored: Tensor  #: ``[T, B, H]``
    context: Tensor  #: ``[T, H, B]``
    align: Tensor  #: ``[T, B, S]``
    attended: Tensor  #: ``[T, B, H]``


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    return (c_void_p * len(tensors))(*(pointer(tensor) for tensor in tensors))


def _inputs(emb: Tensor, patterns: DecoderPatterns, hidden: int) -> Kept | None:
    """Kept units of ``[emb_t, feed]``, side by side."""
    count, size = emb.shape[1], emb.shape[2]
    if patterns.embedding is None and patterns.feed is None:
        return None
    parts = [patterns.embedding or Kept.all(count, size), patterns.feed or Kept.all(count, hidden)]
    return Kept.concat(parts)


class _Arguments:
    """The structure that the library takes, with the tensors that must outlive it."""

    def __init__(self, weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns) -> None:
        math = opmath(inputs.emb.dtype)
        self.weights, self.emb, self.memory = weights, adjacent(inputs.emb.to(math)), _dense(inputs.memory, math)
        self.state = [_dense(tensor, math) for tensor in (inputs.h0, inputs.c0, inputs.feed0)]
        self.lengths = inputs.lengths.to(torch.int32).contiguous()
        self.hidden, self.layers = weights.join.shape[1], len(weights.cells)
        self.inputs = [_inputs(self.emb, patterns, self.hidden), *patterns.between]
        self.patterns = patterns
        self.alive: list[Any] = []

    def kept(self, pattern: Pattern, size: int) -> CKept:
        """The pattern's kept units as the library takes them: all of them beside a multiplier."""
        structure, indices = c_kept(None if isinstance(pattern, torch.Tensor) else pattern, size)
        self.alive.append(indices)
        return structure

    def mask(self, pattern: Pattern) -> Tensor | None:
        """The pattern as a multiplier, if it is one."""
        if not isinstance(pattern, torch.Tensor):
            return None
        mask = pattern.to(self.emb.dtype).contiguous()
        self.alive.append(mask)
        return mask

    def saved(self) -> Saved:
        """Room for what the backward call needs."""
        batch, count, _ = self.emb.shape
        dtype, rows, hidden = self.emb.dtype, batch * count, self.hidden
        width, panels = panel_width(dtype), panels_of_layer(hidden, dtype)

        def compact(pattern: Pattern, size: int) -> Tensor:
            return empty((pattern.width if isinstance(pattern, Kept) else size) * rows, dtype=dtype)

        return Saved(
            [empty(panels, padded_rows(rows, dtype), width, dtype=dtype) for _ in range(self.layers)],
            [empty(rows, panels * width // 4, dtype=dtype) for _ in range(self.layers)],
            [compact(pattern, hidden) for pattern in self.patterns.recurrent],
            [compact(pattern, cell.input_size) for pattern, cell in zip(self.inputs, self.weights.cells, strict=True)],
            compact(self.patterns.query, hidden),
            *(empty(count, batch, hidden, dtype=dtype), empty(count, hidden, batch, dtype=dtype)),
            *(empty(count, batch, self.memory.shape[1], dtype=dtype), empty(count, batch, hidden, dtype=dtype)),
        )

    def structure(self, saved: Saved) -> CDecoder:
        """The call; valid while this object and ``saved`` live."""
        cells = [cell.data for cell in self.weights.cells]
        sizes = [cell.input_size for cell in self.weights.cells]
        kept_input = (CKept * self.layers)(*map(self.kept, self.inputs, sizes))
        kept_recurrent = (CKept * self.layers)(
            *(self.kept(pattern, self.hidden) for pattern in self.patterns.recurrent)
        )
        h0, c0, feed = self.state
        query = self.weights.query
        return CDecoder(
            c_steps(self.emb, _BATCH_FIRST), self.layers, self.emb.shape[2], self.hidden, self.memory.shape[1],
            _addresses([cell.weight_ih for cell in cells]), _addresses([cell.weight_hh for cell in cells]),
            _addresses([cell.bias for cell in cells]),
            None if query is None else pointer(query.data.panels), pointer(self.weights.join.data.panels),
            c_rows(self.emb, _BATCH_FIRST), kept_input, kept_recurrent,
            self.kept(self.patterns.query, self.hidden), self.kept(self.patterns.output, self.hidden),
            _addresses([self.mask(pattern) for pattern in self.patterns.recurrent]),
            _addresses([self.mask(pattern) for pattern in self.patterns.between]),
            pointer(self.mask(self.patterns.query)), pointer(self.mask(self.patterns.output)),
            pointer(self.memory), pointer(self.lengths), pointer(h0), pointer(c0), pointer(feed),
            _addresses(saved.gates), _addresses(saved.cells), _addresses(saved.operand), _addresses(saved.input),
            pointer(saved.query), pointer(saved.scored), pointer(saved.context), pointer(saved.align),
            pointer(saved.attended),
        )  # fmt: skip


def decoder_forward(weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns) -> DecoderResult:
    """See :func:`sd_plugin.kernels.decoder_forward`."""
    dtype = inputs.emb.dtype
    call = _Arguments(weights, inputs, patterns)
    math, saved = call.emb.dtype, call.saved()
    y = empty(*call.emb.shape[:2], call.hidden, dtype=math)
    h_n, c_n = torch.empty_like(call.state[0]), torch.empty_like(call.state[1])
    out = CDecoderOut(c_rows(y, _BATCH_FIRST), pointer(h_n), pointer(c_n))
    structure = call.structure(saved)
    function("sd_decoder_forward", math)(torch.get_num_threads(), byref(structure), byref(out))
    # Copied: the backward call needs what the attention was, whatever the program makes of the result.
    align = saved.align.to(dtype, copy=True)
    return DecoderResult(y.to(dtype), h_n.to(dtype), c_n.to(dtype), align, saved)


def decoder_backward(
    weights: DecoderWeights,
    inputs: DecoderInputs,
    saved: Saved,
    gradients: DecoderResultGradients,
    patterns: DecoderPatterns,
    weights_wanted: bool,
) -> DecoderGradients:
    """See :func:`sd_plugin.kernels.decoder_backward`."""
    dtype = inputs.emb.dtype
    call = _Arguments(weights, inputs, patterns)
    math = call.emb.dtype
    dy = adjacent(gradients.y.to(math))
    dh_n, dc_n = _dense(gradients.h_n, math), _dense(gradients.c_n, math)
    dalign = None if gradients.align is None else _dense(gradients.align, math)
    hidden, sizes = call.hidden, [cell.input_size for cell in weights.cells] if weights_wanted else []
    demb, dmemory = empty(*call.emb.shape, dtype=math), empty(*call.memory.shape, dtype=math)
    dh0, dc0, dfeed = (torch.empty_like(tensor) for tensor in call.state)
    dw = [empty(4 * hidden, size, dtype=math) for size in sizes]
    du = [empty(4 * hidden, hidden, dtype=math) for _ in sizes]
    dbias = [empty(4 * hidden, dtype=math) for _ in sizes]
    dquery = empty(hidden, hidden, dtype=math) if weights_wanted and weights.query is not None else None
    djoin = empty(hidden, 2 * hidden, dtype=math) if weights_wanted else None
    grad = CDecoderGrad(
        c_rows(dy, _BATCH_FIRST), pointer(dh_n), pointer(dc_n), pointer(dalign), c_rows(demb, _BATCH_FIRST),
        pointer(dmemory), pointer(dh0), pointer(dc0), pointer(dfeed),
        *(_addresses(part) if weights_wanted else None for part in (dw, du, dbias)), pointer(dquery), pointer(djoin),
    )  # fmt: skip
    structure = call.structure(saved)
    function("sd_decoder_backward", math)(torch.get_num_threads(), byref(structure), byref(grad))
    return DecoderGradients(
        demb.to(dtype),
        dmemory.to(dtype),
        dh0.to(dtype),
        dc0.to(dtype),
        dfeed.to(dtype),
        tuple((w.to(dtype), u.to(dtype), bias.to(dtype)) for w, u, bias in zip(dw, du, dbias, strict=True)),
        None if dquery is None else dquery.to(dtype),
        None if djoin is None else djoin.to(dtype),
    )


def _dense(tensor: Tensor, math: torch.dtype) -> Tensor:
    return tensor.to(math).contiguous()
