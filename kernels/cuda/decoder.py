"""The input-feeding decoder: at each step a product and a kernel for each layer, and one of each for the attention.

What does not depend on the step before has all steps in one product. With ``keys = memory Wᵀ`` and ``values =
memory W_out[:H]``, both linear in the source, ``y = drop(tanh(softmax(q · keys) values + q W_out[H:]))``.
Operands hold zeros for what is dropped: products as small as a step's are not faster for skipping it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..contract import DecoderGradients, DecoderResult
from ..dispatch import BackendError
from ..kept import Kept
from ..steps import Steps
from . import gemm, lstm, precision
from .driver import Unit, driver, launch
from .precision import Precision, product

if TYPE_CHECKING:
    from torch import Tensor

    from ..contract import DecoderInputs, DecoderPatterns, DecoderResultGradients, DecoderWeights, Pattern
    from .driver import Argument

    _Step = Callable[[int], None]
    _Product = Callable[[Tensor, Tensor], Any]

# As in src/decoder.cu.
_THREADS, _MOST_THREADS = 256, 512
_LOAD = 16  # bytes


class _Drop(NamedTuple):
    """Multipliers of a kernel's results; ones if there are none."""

    factors: Tensor | None  #: ``[T, H]``, or ``[T, B, H]`` if ``per_row``; float32
    per_row: int


class _Drops(NamedTuple):
    feed: Tensor | None  #: ``[T, H]``
    above: list[_Drop]  #: of each layer's output, on its way to the next layer or to the attention
    own: list[_Drop]  #: of each layer's ``h_{t-1}``
    output: _Drop


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass. Rows are ``[T, B]`` or ``[B, T]``, as ``time_dim`` says."""

    time_dim: int
    drops: _Drops
    weights: list[Tensor]  #: of each layer ``[inputs + H, columns]``, by units, the gates of a unit side by side
    keys: Tensor  #: ``[B, S, H]``
    values: Tensor  #: ``[B, S, H]``
    operands: Tensor  #: ``[layers, rows, 2H]``: feed or output of the layer below, and ``h_{t-1}``, all dropped
    gates: Tensor  #: ``[layers, T, B, H, 4]``
    cells: Tensor  #: ``[layers, T + 1, B, H]``
    query: Tensor  #: ``[rows, H]``, dropped
    attended: Tensor  #: ``[rows, H]``, not dropped
    align: Tensor  #: ``[T, B, S]``


def decoder_forward(weights: DecoderWeights, inputs: DecoderInputs, patterns: DecoderPatterns) -> DecoderResult:
    """See :func:`sd_plugin.kernels.decoder_forward`.

    Raises:
        BackendError: the source is too long for the shared memory of a block, which has two floats for each position.
    """
    # A transposed view is as good as what it is a view of.
    call = _Launches(weights, inputs, int(not inputs.emb.transpose(0, 1).is_contiguous()))
    with torch.no_grad(), precision.cublas(call.precision is Precision.TF32):
        return _forward(call, weights, inputs, patterns)


def decoder_backward(
    weights: DecoderWeights,
    inputs: DecoderInputs,
    saved: Saved,
    gradients: DecoderResultGradients,
    patterns: DecoderPatterns,
    weights_wanted: bool,
) -> DecoderGradients:
    """See :func:`sd_plugin.kernels.decoder_backward`."""
    call = _Launches(weights, inputs, saved.time_dim)
    with torch.no_grad(), precision.cublas(call.precision is Precision.TF32):
        dgates, djoined, dscores, dinitial = _through_time(call, saved, weights, gradients)
        dmemory, dquery, djoin = _attention_gradients(
            call, saved, weights, inputs.memory, djoined, dscores, weights_wanted
        )
        embedding = None if patterns.embedding is None else patterns.embedding.unscaled()
        demb = gemm.bp(dgates[0], call.embedding_weight(saved.weights[0]), embedding, call.layout, call.precision)
        cells = _cell_gradients(call, saved, call.laid_out(inputs.emb), embedding, dgates) if weights_wanted else ()
    return DecoderGradients(call.batch_first(demb), dmemory, *dinitial, cells, dquery, djoin)


class _Launches:
    """Sizes of a call, and its launches."""

    def __init__(self, weights: DecoderWeights, inputs: DecoderInputs, time_dim: int) -> None:
        emb = inputs.emb
        cell: lstm.PackedLSTM = weights.cells[0].data
        self.precision, self.columns = cell.precision, cell.recurrent.shape[1]
        self.layers, self.layout, self.like = len(weights.cells), Steps(time_dim), emb
        self.batch, self.count, self.embed = emb.shape
        self.source, self.hidden = inputs.memory.shape[1:]
        self.lengths = inputs.lengths.to(emb.device, torch.int32).contiguous()
        self._unit = Unit("decoder", (("SD_PRECISION", int(self.precision)),))
        strides = (1, self.count) if time_dim else (self.batch, 1)
        self._place = (self.count, *strides)
        self._threads = min(_MOST_THREADS, max(2, -(-self.hidden // 32)) * 32)
        room = max(self.hidden, self._threads * (_LOAD // emb.element_size()))
        self._shared = 4 * (-(-self.hidden // 4) * 4 + 2 * self.source + room)

    def laid_out(self, x: Tensor) -> Tensor:
        """``[B, T, K]`` in the layout of all activations."""
        return x.contiguous() if self.layout.time_dim else x.transpose(0, 1).contiguous()

    def batch_first(self, x: Tensor) -> Tensor:
        """An activation as ``[B, T, K]``."""
        return x if self.layout.time_dim else x.transpose(0, 1)

    def rows(self, *sizes: int, stack: tuple[int, ...] = ()) -> Tensor:
        """Room for an activation, or several of them."""
        rows = (self.batch, self.count) if self.layout.time_dim else (self.count, self.batch)
        return self.like.new_empty(*stack, *rows, *sizes)

    def result(self, size: int) -> Tensor:
        """Room for an activation in this layout that goes by ``[B, T, K]``, and is no view."""
        strides = (self.count * size, size, 1) if self.layout.time_dim else (size, self.batch * size, 1)
        return self.like.new_empty_strided((self.batch, self.count, size), strides)

    def floats(self, *sizes: int) -> Tensor:
        """Room for sums."""
        return self.like.new_empty(sizes, dtype=torch.float32)

    def embedding_weight(self, weight: Tensor) -> gemm.PackedMatrix:
        """The embedding's part of the first layer's weight."""
        return gemm.PackedMatrix(weight[: self.embed], self.columns)

    def of_step(self, weights: list[Tensor]) -> list[Tensor]:
        """``[2H, columns]`` of each layer: what an operand of a step is multiplied by."""
        return [weights[0][self.embed :], *weights[1:]]

    def of_units(self, function: str, *arguments: Argument) -> None:
        """Launch a kernel with a thread for each unit of each row."""
        launch(self._unit, function, self.like, -(-self.batch * self.hidden // _THREADS), _THREADS, *arguments)

    def cell(self, function: str, *arguments: Argument) -> _Step:
        """A kernel of a layer, for any step."""
        unit, like, grid = self._unit, self.like, -(-self.batch * self.hidden // _THREADS)
        given = (*arguments, self.batch, self.hidden, self.columns, *self._place)
        return lambda step: launch(unit, function, like, grid, _THREADS, *given, step)

    def attend(self, function: str, *arguments: Argument) -> _Step:
        """A kernel of the attention, for any step."""
        if self._shared > driver().properties(self.like.device).shared_memory:
            raise BackendError(f"backend cuda: no attention over {self.source} positions of {self.hidden} units")
        unit, like, grid, threads, shared = self._unit, self.like, self.batch, self._threads, self._shared
        given = (*arguments, self.batch, self.hidden, self.source, *self._place)
        return lambda step: launch(unit, function, like, grid, threads, *given, step, shared=shared)

    def product(self, weight: Tensor) -> _Product:
        """``out = x @ weight`` with float32 sums, without what :func:`product` takes of the host's time every step."""
        if self.precision.dtype == torch.float32:
            return lambda x, out: torch.mm(x, weight, out=out)
        if self.like.is_cuda and precision.HAS_OUT_DTYPE:
            return lambda x, out: torch.mm(x, weight, out_dtype=torch.float32, out=out)
        in_float = weight.float()
        return lambda x, out: torch.mm(x.float(), in_float, out=out)

    def drops(self, patterns: DecoderPatterns) -> _Drops:
        """Patterns as the kernels take them."""

        def drop(pattern: Pattern) -> _Drop:
            found = lstm.recurrent_of(pattern, self.count, self.hidden, self.precision)
            return _Drop(found.factors if found.mask is None else found.mask, int(found.per_row))

        return _Drops(
            None if patterns.feed is None else drop(patterns.feed.unscaled()).factors,
            [drop(pattern) for pattern in (*patterns.between, patterns.query)],
            [drop(pattern) for pattern in patterns.recurrent],
            drop(patterns.output),
        )


def _forward(
    call: _Launches,
    weights: DecoderWeights,
    inputs: DecoderInputs,
    patterns: DecoderPatterns,
) -> DecoderResult:
    emb, memory, h0, c0, feed0 = call.laid_out(inputs.emb), inputs.memory, inputs.h0, inputs.c0, inputs.feed0
    batch, count, hidden, columns, layers = call.batch, call.count, call.hidden, call.columns, call.layers
    drops, layer_weights = call.drops(patterns), [_weight(cell.data) for cell in weights.cells]
    embedding = None if patterns.embedding is None else patterns.embedding.unscaled()
    of_embedding = gemm.fp(
        emb, call.embedding_weight(layer_weights[0]), embedding, call.layout, call.precision, torch.float32
    )
    of_context, of_query = weights.join.data.matrix.split(hidden)
    flat = memory.reshape(-1, hidden)
    values = product(flat, of_context, call.precision).view(memory.shape)
    if weights.query is None:
        keys = memory.contiguous()
    else:
        keys = product(flat, weights.query.data.matrix.t(), call.precision).view(memory.shape)
    saved = Saved(
        call.layout.time_dim, drops, layer_weights, keys, values, call.rows(2 * hidden, stack=(layers,)),
        call.floats(layers, count, batch, hidden, 4), call.floats(layers, count + 1, batch, hidden),
        call.rows(hidden), call.rows(hidden), emb.new_empty(count, batch, call.source),
    )  # fmt: skip
    saved.cells[:, 0] = c0
    y, h_n = call.result(hidden), h0.clone(memory_format=torch.contiguous_format)
    sums, joined = call.floats(batch, columns), call.floats(batch, hidden)
    if count:
        row_stride = call._place[2]
        for operand, h, drop in zip(saved.operands, h0.contiguous(), drops.own, strict=True):
            call.of_units("decoder_start", h, drop.factors, operand, drop.per_row, batch, hidden, row_stride, hidden)
        call.of_units(
            "decoder_start", feed0.contiguous(), drops.feed, saved.operands[0], 0, batch, hidden, row_stride, 0
        )

    cells = []
    for layer, (weight, above, own) in enumerate(zip(call.of_step(layer_weights), drops.above, drops.own, strict=True)):
        last = layer == layers - 1
        run = call.cell(
            "decoder_cell_forward", sums, None if layer else of_embedding, weights.cells[layer].data.bias,
            saved.cells[layer], saved.gates[layer], above.factors, saved.query if last else saved.operands[layer + 1],
            own.factors, saved.operands[layer], h_n[layer], above.per_row, own.per_row, hidden if last else 2 * hidden,
        )  # fmt: skip
        cells.append((call.layout.split(saved.operands[layer]), call.product(weight), run))
    attend = call.attend(
        "decoder_attend_forward", keys, values, call.lengths, saved.query, joined, drops.output.factors, drops.feed,
        saved.align, saved.attended, y, saved.operands[0], drops.output.per_row,
    )  # fmt: skip
    join = call.product(of_query)
    for step, query in enumerate(call.layout.split(saved.query)):
        for operands, multiply, run in cells:
            multiply(operands[step], sums)
            run(step)
        join(query, joined)
        attend(step)
    c_n = torch.empty_like(h_n).copy_(saved.cells[:, count])
    return DecoderResult(y, h_n, c_n, saved.align.clone(), saved)


def _weight(cell: lstm.PackedLSTM) -> Tensor:
    """``[I + H, columns]``: the weights of the input and, below, of ``h``; the gates of a unit side by side."""
    inputs, hidden, columns = cell.weight_ih.units, cell.hidden, cell.recurrent.shape[1]
    weight = cell.recurrent.new_empty(inputs + hidden, columns)
    by_gates = cell.weight_ih.matrix.unflatten(1, (4, hidden))
    weight[:inputs, : 4 * hidden].unflatten(1, (hidden, 4)).copy_(by_gates.transpose(1, 2))
    if columns > 4 * hidden:
        weight[:inputs, 4 * hidden :] = 0
    weight[inputs:] = cell.recurrent
    return weight


def _through_time(
    call: _Launches, saved: Saved, weights: DecoderWeights, gradients: DecoderResultGradients
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Gradients of the gates ``[layers, rows, columns]``, of what tanh is taken of ``[rows, H]``, of the scores
    ``[T, B, S]``, and of ``h_0``, ``c_0`` and the initial feed.
    """
    dy, dh_n, dc_n, dalign = gradients
    dy = call.laid_out(dy)
    batch, count, hidden, columns, layers = call.batch, call.count, call.hidden, call.columns, call.layers
    drops, dgates, djoined = saved.drops, call.rows(columns, stack=(layers,)), call.rows(hidden)
    dscores = torch.empty_like(saved.align)
    if columns > 4 * hidden:
        dgates[..., 4 * hidden :] = 0
    # Of each layer's operand at the step after; after the last step, of the final state.
    through = torch.zeros(layers, batch, 2 * hidden, device=dy.device)
    through[..., hidden:] = dh_n
    dc = call.floats(layers, batch, hidden).copy_(dc_n)
    through_scores, through_join = call.floats(batch, hidden), call.floats(batch, hidden)

    attend = call.attend(
        "decoder_attend_backward", saved.keys, saved.values, call.lengths, dy, through[0], drops.output.factors,
        drops.feed, saved.align, saved.attended, None if dalign is None else dalign.contiguous(), djoined, dscores,
        through_scores, drops.output.per_row,
    )  # fmt: skip
    cells = []
    for layer, (weight, above, own) in enumerate(zip(call.of_step(saved.weights), drops.above, drops.own, strict=True)):
        last = layer == layers - 1
        run = call.cell(
            "decoder_cell_backward", saved.gates[layer], saved.cells[layer],
            *((through_join, through_scores) if last else (through[layer + 1], None)), above.factors, through[layer],
            own.factors, dc[layer], dgates[layer], above.per_row, own.per_row, hidden if last else 2 * hidden,
        )  # fmt: skip
        cells.append((call.layout.split(dgates[layer]), call.product(weight.t()), through[layer], run))
    cells.reverse()
    join, rows = call.product(weights.join.data.matrix[hidden:].t()), call.layout.split(djoined)
    for step in range(count - 1, -1, -1):
        attend(step)
        join(rows[step], through_join)
        for gates, multiply, result, run in cells:
            run(step)
            multiply(gates[step], result)

    dh0, dfeed0 = dy.new_empty(layers, batch, hidden), dy.new_empty(batch, hidden)
    for layer, drop in enumerate(drops.own):
        factors = drop.factors if count else None
        call.of_units("decoder_finish", through[layer], factors, dh0[layer], drop.per_row, batch, hidden, hidden)
    call.of_units("decoder_finish", through[0], drops.feed if count else None, dfeed0, 0, batch, hidden, 0)
    return dgates, djoined, dscores, (dh0, dc.to(dy.dtype), dfeed0)


def _attention_gradients(
    call: _Launches,
    saved: Saved,
    weights: DecoderWeights,
    memory: Tensor,
    djoined: Tensor,
    dscores: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of ``memory``, and of the query's and the output's weights as the host holds them."""
    hidden, dtype = call.hidden, memory.dtype
    of_context = weights.join.data.matrix[:hidden]
    dkeys, dvalues = (
        torch.bmm(by_step.permute(1, 2, 0), call.batch_first(rows)).view(-1, hidden)
        for by_step, rows in ((dscores, saved.query), (saved.align, djoined))
    )
    dmemory = product(dvalues, of_context.t(), call.precision, torch.float32)
    if weights.query is None:
        dmemory += dkeys
    else:
        dmemory += product(dkeys, weights.query.data.matrix, call.precision, torch.float32)
    dquery = djoin = None
    if wanted:
        flat = memory.reshape(-1, hidden)
        if weights.query is not None:
            dquery = product(flat.t(), dkeys, call.precision)
        djoin = memory.new_empty(hidden, 2 * hidden)
        djoin[:, :hidden] = product(dvalues.t(), flat, call.precision)
        djoin[:, hidden:] = product(djoined.flatten(0, 1).t(), saved.query.flatten(0, 1), call.precision)
    return dmemory.view(memory.shape).to(dtype), dquery, djoin


def _cell_gradients(
    call: _Launches, saved: Saved, emb: Tensor, embedding: Kept | None, dgates: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """``weight_ih``, ``weight_hh`` and the bias of each layer, as ``torch.nn.LSTM`` holds them."""
    hidden = call.hidden

    def by_gates(gradient: Tensor) -> Tensor:
        """``[columns, K]`` as ``[4, H, K]``."""
        return gradient[: 4 * hidden].view(hidden, 4, gradient.shape[1]).transpose(0, 1)

    def copied(*parts: Tensor) -> Tensor:
        """Side by side, as ``[4H, K]``."""
        whole = emb.new_empty(4, hidden, sum(part.shape[2] for part in parts))
        for to, part in zip(whole.split([part.shape[2] for part in parts], 2), parts, strict=True):
            to.copy_(part)
        return whole.flatten(0, 1)

    cells, flat = [], dgates.flatten(1, 2)
    biases = flat.sum(1, dtype=torch.float32)
    for layer, operand in enumerate(saved.operands.flatten(1, 2)):
        both = by_gates(product(flat[layer].t(), operand, call.precision, torch.float32))
        of_inputs = [both[..., :hidden]]
        if layer == 0:
            of_embedding = gemm.wg(emb, dgates[0], embedding, call.layout, call.precision, torch.float32)
            of_inputs.insert(0, by_gates(of_embedding.t()))
        bias = copied(by_gates(biases[layer].unsqueeze(1))).flatten()
        cells.append((copied(*of_inputs), copied(both[..., hidden:]), bias))
    return tuple(cells)
