"""The input-feeding attentional decoder, a step at a time; its gradients by autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..contract import DecoderGradients, DecoderResult
from .gemm import StepPattern, opmath

if TYPE_CHECKING:
    from torch import Tensor

    from ..contract import DecoderInputs, DecoderPatterns, DecoderResultGradients, DecoderWeights
    from .lstm import PackedLSTM


class _Weights(NamedTuple):
    """What is multiplied by, in the dtype of the sums."""

    cells: list[PackedLSTM]
    query: Tensor | None  #: ``[H, H]``, K-major
    join: Tensor  #: ``[2H, H]``, K-major


def decoder_forward(weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns) -> DecoderResult:
    """See :func:`sd_plugin.kernels.decoder_forward`."""
    to = inputs.emb.dtype
    y, h_n, c_n, align = _equations(_unpacked(weights), _in_math(inputs), patterns)
    return DecoderResult(y.to(to), h_n.to(to), c_n.to(to), align.to(to), ())


def decoder_backward(
    weights: DecoderWeights,
    inputs: DecoderInputs,
    saved: tuple[()],
    gradients: DecoderResultGradients,
    patterns: DecoderPatterns,
    weights_wanted: bool,
) -> DecoderGradients:
    """See :func:`sd_plugin.kernels.decoder_backward`. The forward pass is run again, for autograd to see."""
    to, math = inputs.emb.dtype, opmath(inputs.emb.dtype)
    used, given = _unpacked(weights), _in_math(inputs)
    activations = [given.emb, given.memory, given.h0, given.c0, given.feed0]
    matrices = [used.join, *([] if used.query is None else [used.query])]
    for cell in used.cells:
        matrices += [cell.weight_ih_t, cell.weight_hh_t, _bias(cell)]
    leaves = [tensor.detach().requires_grad_() for tensor in (*activations, *matrices)]
    emb, memory, h0, c0, feed0, join, *rest = leaves
    query = rest.pop(0) if used.query is not None else None
    cells = [type(cell)(*rest[3 * n : 3 * n + 3]) for n, cell in enumerate(used.cells)]
    with torch.enable_grad():
        results = _equations(
            _Weights(cells, query, join), given._replace(emb=emb, memory=memory, h0=h0, c0=c0, feed0=feed0), patterns
        )
        told = [
            (result, d.to(math))
            for result, d in zip(results, gradients, strict=True)
            if d is not None and result.requires_grad  # an empty target's are made of nothing
        ]
        found = torch.autograd.grad(
            [result for result, _ in told], leaves, [d for _, d in told], allow_unused=True, materialize_grads=True
        )
    demb, dmemory, dh0, dc0, dfeed0 = (gradient.to(to) for gradient in found[:5])
    if not weights_wanted:
        return DecoderGradients(demb, dmemory, dh0, dc0, dfeed0, (), None, None)
    djoin, *others = (gradient.t().to(to) for gradient in found[5:])
    dquery = others.pop(0) if query is not None else None
    dcells = tuple((others[n], others[n + 1], others[n + 2]) for n in range(0, len(others), 3))
    return DecoderGradients(demb, dmemory, dh0, dc0, dfeed0, dcells, dquery, djoin)


def _unpacked(weights: DecoderWeights) -> _Weights:
    query = None if weights.query is None else weights.query.data
    return _Weights([cell.data for cell in weights.cells], query, weights.join.data)


def _in_math(inputs: DecoderInputs) -> DecoderInputs:
    """``inputs`` in the dtype of the sums."""
    math = opmath(inputs.emb.dtype)
    given = inputs._asdict()
    return type(inputs)(**{name: given[name] if name == "lengths" else given[name].to(math) for name in given})


def _bias(cell: PackedLSTM) -> Tensor:
    return cell.weight_ih_t.new_zeros(cell.weight_ih_t.shape[1]) if cell.bias is None else cell.bias


def _equations(
    weights: _Weights, inputs: DecoderInputs, patterns: DecoderPatterns
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y`` ``[B, T, H]``, the final states, and the attention ``[T, B, S]``."""
    emb, memory, lengths, h0, c0, feed = inputs
    h, c = list(h0), list(c0)
    beyond = torch.arange(memory.shape[1], device=memory.device) >= lengths.unsqueeze(1)
    outputs, aligns = [], []
    for t, emb_t in enumerate(emb.unbind(1)):
        x = _cells(weights, (emb_t, feed), (h, c), patterns, t)
        scored = x if weights.query is None else x @ weights.query
        scores = torch.einsum("bh,bsh->bs", scored, memory)
        # Zeros for a source of no positions, too, of which minus infinity would make what is no number.
        align = scores.masked_fill(beyond, torch.finfo(scores.dtype).min).softmax(1).masked_fill(beyond, 0)
        context = torch.einsum("bs,bsh->bh", align, memory)
        feed = _dropped((torch.cat([context, x], 1) @ weights.join).tanh(), StepPattern(patterns.output, t))
        outputs.append(feed)
        aligns.append(align)
    if not outputs:
        hidden, (batch, source, _) = feed.shape[1], memory.shape
        return emb.new_zeros(batch, 0, hidden), h0.clone(), c0.clone(), emb.new_zeros(0, batch, source)
    return torch.stack(outputs, 1), torch.stack(h), torch.stack(c), torch.stack(aligns)


def _cells(
    weights: _Weights,
    inputs: tuple[Tensor, Tensor],
    states: tuple[list[Tensor], list[Tensor]],
    patterns: DecoderPatterns,
    t: int,
) -> Tensor:
    """All layers at step ``t``: the dropped output of the last; ``states`` are replaced by the next ones."""
    h, c = states
    above = [*patterns.between, patterns.query]
    x = torch.cat(inputs, 1)
    size = inputs[0].shape[1]
    for layer, cell in enumerate(weights.cells):
        if layer:
            pre = x @ cell.weight_ih_t
        else:
            pre = _product(inputs[0], cell.weight_ih_t[:size], StepPattern(patterns.embedding, t))
            pre = pre + _product(inputs[1], cell.weight_ih_t[size:], StepPattern(patterns.feed, t))
        pre = pre + _product(h[layer], cell.weight_hh_t, StepPattern(patterns.recurrent[layer], t)) + _bias(cell)
        i, f, g, o = pre.chunk(4, 1)
        c[layer] = f.sigmoid() * c[layer] + i.sigmoid() * g.tanh()
        h[layer] = o.sigmoid() * c[layer].tanh()
        x = _dropped(h[layer], StepPattern(above[layer], t))
    return x


def _product(x: Tensor, weight_t: Tensor, step: StepPattern) -> Tensor:
    return step.take(x) @ step.rows(weight_t)


def _dropped(x: Tensor, step: StepPattern) -> Tensor:
    """``x`` with zeros for what the step's pattern drops, and the rest scaled."""
    if step.index is None:
        return step.take(x)
    return torch.zeros_like(x).index_add(1, step.index, step.take(x))
