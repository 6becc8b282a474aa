"""An input-feeding decoder with Luong attention as one differentiable operation over the whole target sequence.

The embedding's product is taken over all steps at once, and every weight gradient once, not added up step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from . import _check, _stash, hints, kernels
from ._autocast import autocast_dtype
from ._compile import opaque
from .functional import Operand, Operation, once_differentiable, pack_parameters
from .kernels import (
    DecoderInputs,
    DecoderPatterns,
    DecoderResultGradients,
    DecoderWeights,
    Kept,
    Steps,
    has_memory,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .cell import StackedRun, SteppedDropout

_BATCH_FIRST = Steps(1)


@dataclass
class _Call:
    """The part of a decoder's call that is not differentiated."""

    patterns: DecoderPatterns
    embedding: Operand
    counted: list[tuple[Operand, int, int]]  #: operand of a product, its rows and columns
    backend: str

    def count(self, products: int) -> None:
        """Count every product that often."""
        for operand, rows, columns in self.counted:
            operand.count(rows, columns, self.backend, products)


class _AttentionalDecoder(Operation):
    """See :func:`sd_plugin.kernels.decoder_forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        emb: Tensor,
        memory: Tensor,
        lengths: Tensor,
        h0: Tensor,
        c0: Tensor,
        feed: Tensor,
        weights: DecoderWeights,
        call: _Call,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = DecoderInputs(emb, memory, lengths, h0, c0, feed)
        y, h_n, c_n, align, saved = kernels.decoder_forward(weights, inputs, call.patterns)
        _stash.save(ctx, inputs, weights, saved)
        ctx.call = call
        # A gradient that nobody has is not filled with zeros.
        ctx.set_materialize_grads(False)
        call.count(1)
        return y, h_n, c_n, align

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dalign: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, weights, saved = _stash.saved(ctx)
        call: _Call = ctx.call
        patterns, emb, feed = call.patterns, inputs.emb, inputs.feed0
        if _check.ENABLED:
            call.embedding.check(emb, _BATCH_FIRST, "at the backward pass")
        if ctx.needs_input_grad[0] and call.embedding.is_read:
            # What was saved holds kept columns only, and to run it again is as rare as that somebody looks.
            patterns = replace(patterns, embedding=None)
            saved = kernels.decoder_forward(weights, inputs, patterns).saved
        gradients = DecoderResultGradients(
            emb.new_zeros(*emb.shape[:2], feed.shape[1]) if dy is None else dy,
            torch.zeros_like(inputs.h0) if dh_n is None else dh_n,
            torch.zeros_like(inputs.c0) if dc_n is None else dc_n,
            dalign,
        )
        wanted = ctx.needs_input_grad[8:]
        grads = kernels.decoder_backward(weights, inputs, saved, gradients, patterns, any(wanted))
        call.count(1 + any(wanted))
        of_inputs = (grads.emb, grads.memory, None, grads.h0, grads.c0, grads.feed0, None, None)
        if not any(wanted):
            return (*of_inputs, *(None for _ in wanted))
        of_cells: list[Tensor] = []
        for dw, du, dbias in grads.cells:
            # A copy: torch may accumulate into the tensor it is given.
            of_cells += [dw, du, dbias, dbias.clone()]
        of_parameters = [*of_cells, grads.query, grads.join]
        return (*of_inputs, *(grad if want else None for grad, want in zip(of_parameters, wanted, strict=True)))


def is_available(like: Tensor) -> bool:
    """The backend for tensors like this one is faster with the whole decoder at once."""
    if autocast_dtype(like.device.type) is not None or not has_memory(like):
        return False
    return kernels.decodes_at_once(like.device, like.dtype)


@opaque
def attentional_decoder(
    run: StackedRun,
    emb: Tensor,
    memory: Tensor,
    lengths: Tensor,
    state: tuple[Tensor, Tensor],
    feed: Tensor,
    output: SteppedDropout,
    query_weight: Tensor | None,
    join_weight: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Run stacked cells with input feed and Luong attention over a whole target sequence.

    Args:
        run: the cells and the patterns drawn for this sequence.
        emb: ``[B, T, E]`` target embeddings, with their hint, if any.
        memory: ``[B, S, H]`` the encoder's output; lengths: ``[B]`` source lengths.
        state: ``h`` and ``c`` ``[layers, B, H]``; feed: ``[B, H]``, the initial input feed.
        output: dropout of the decoder's output.
        query_weight: ``[H, H]`` of general attention, None for dot; join_weight: ``[H, 2H]``.

    Returns:
        ``[B, T, H]`` with its hint, the final state, and the attention ``[T, B, S]``.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree.
    """
    batch, count, _ = emb.shape
    hidden, rows = feed.shape[1], batch * count
    hint = hints.lookup(emb)
    embedding = Operand.hinted(hint if hint is not None and hint.speaks_of(emb, _BATCH_FIRST) else None, emb)
    recurrent, between, query, dropped = run.operands(output)
    patterns = DecoderPatterns(
        embedding.kept, _feed_pattern(dropped.kept, feed), tuple(operand.pattern for operand in between),
        tuple(operand.pattern for operand in recurrent), query.pattern, dropped.pattern,
    )  # fmt: skip
    weights = DecoderWeights(
        tuple(pack_parameters(parameters) for parameters in run.parameters),
        None if query_weight is None else _pack(query_weight),
        _pack(join_weight),
    )
    counted = [(embedding, rows, 4 * hidden), (query, rows, hidden), (dropped, rows - batch, 4 * hidden)]
    counted += [(operand, rows, 4 * hidden) for operand in (*between, *recurrent)]
    if query_weight is not None:
        counted.append((query, rows, hidden))
    call = _Call(patterns, embedding, counted, weights.join.backend.name)
    parameters = [parameter for parameters in run.parameters for parameter in parameters]
    y, h_n, c_n, align = _AttentionalDecoder.apply(
        emb, memory, lengths, *state, feed, weights, call, *parameters, query_weight, join_weight
    )
    if dropped.parts:
        hints.attach(y, dropped.parts, _BATCH_FIRST)
    return y, (h_n, c_n), align


def _pack(weight: Tensor) -> kernels.PackedMatrix:
    return kernels.gemm_pack(weight.detach().t())


def _feed_pattern(output: Kept | None, feed: Tensor) -> Kept | None:
    """Kept units of the feed at each step: those of the step before, and at the first step those of ``feed``."""
    if output is None:
        return None
    indices, size = output.indices, output.size
    if not indices.shape[0]:
        return output.unscaled()
    # To look at it elsewhere would be to wait for the device.
    if feed.device.type == "cpu" and not feed.requires_grad and not feed.any():
        # A feed of zeros, as at the start of a sentence: whatever is visited contributes nothing.
        return Kept(torch.cat([indices[:1], indices[:-1]]), size, 1.0, output.padded)
    everything = torch.arange(size, dtype=torch.int32, device=indices.device).unsqueeze(0)
    filling = indices.new_full((indices.shape[0] - 1, size - indices.shape[1]), size)
    return Kept(torch.cat([everything, torch.cat([indices[:-1], filling], 1)]), size, 1.0, True)
