"""Differentiable structured dropout and the products that skip what it dropped.

Gradients are once differentiable: ``create_graph=True`` through them is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable as torch_once_differentiable

from . import _check, _report, _stash, hints, kernels, stats
from ._autocast import cast_for_autocast, without_autocast
from ._compile import opaque
from ._pays import product_pays
from ._route import Route
from .hints import Draw, Part
from .kernels import (
    TIME_MAJOR,
    Kept,
    LSTMCall,
    LSTMGradients,
    LSTMResultGradients,
    PackedWeights,
    Steps,
    Wanted,
    has_memory,
    refuse_transforms,
)
from .patterns import Case
from .patterns import draw as draw_pattern

if TYPE_CHECKING:
    from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's ``once_differentiable``, which also refuses where torch would silently treat a gradient as constant.

    It refuses gradients that ``is_grads_batched=True`` wraps, too.
    """
    checked = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def refuse_graph(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("products that skip dropped units have no double backward (create_graph=True)")
        for gradient in gradients:
            if gradient is not None:
                has_memory(gradient)
        return checked(ctx, *gradients)

    return refuse_graph


class Operation(torch.autograd.Function):
    """One that runs kernels on memory, which no transform of ``torch.func`` can look into."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """As torch's; RuntimeError within a transform, in a sentence of ours instead of torch's page."""
        refuse_transforms()
        return super().apply(*arguments)


@opaque
def dropout(x: Tensor, p: float, case: Case | str, steps: Steps, *, sampling: str = "exact", site: str) -> Tensor:
    """Drop units of ``x`` by a case of the paper's Fig. 1, scaling the survivors.

    Args:
        x: ``[T, B, K]``, ``[B, T, K]`` or packed ``[R, K]``, as ``steps`` says.
        p: probability that a unit is dropped, in [0, 1); 0 returns ``x`` itself.
        case: ``"I"`` to ``"IV"``; steps: which rows of ``x`` belong to which time step.
        sampling: of the structured cases; see :func:`sd_plugin.patterns.draw_kept`.
        site: name of this place in the report.

    Returns:
        A dense tensor like ``x``. Structured cases attach the hint of which columns are zero.

    Raises:
        ValueError: ``p``, ``case`` or ``sampling`` is out of range, or ``x`` does not fit ``steps``.
    """
    steps.check("x", x)
    count, batch, size = steps.count(x), steps.batch(x), x.shape[-1]
    pattern = draw_pattern(case, count, batch, size, p, sampling=sampling, device=x.device, dtype=x.dtype)
    if pattern is None:
        return x
    if isinstance(pattern, Kept):
        part = Part(pattern, [Draw(site, pattern)])
        return hints.attach(x * steps.spread(pattern.multiplier(x.dtype)), [part], steps)
    return x * _rows_of(pattern, steps)


def _rows_of(mask: Tensor, steps: Steps) -> Tensor:
    """A ``[T, B, K]`` multiplier in the layout of ``steps``."""
    if steps.batch_sizes is None:
        return mask.transpose(0, 1) if steps.time_dim == 1 else mask
    if not steps.batch_sizes:
        return mask.flatten(0, 1)
    return torch.cat([mask[t, :n] for t, n in enumerate(steps.batch_sizes)])


@dataclass
class Operand:
    """An activation's pattern on its way into a product, with the sites to count it for.

    Attributes:
        pattern: kept units, a multiplier ``[T, B, K]`` (random dropout inside the product) or None (dense).
        parts: the dropouts that make the pattern up.
        route: the way of the operand's gradient to these dropouts; None if it has none.
    """

    pattern: Kept | Tensor | None = None
    parts: tuple[Part, ...] = ()
    route: Route | None = None

    @classmethod
    def hinted(cls, hint: hints.Hint | None, x: Tensor) -> Operand:
        """What the hint of ``x`` says; dense without one.

        Raises:
            CheckError: it says what is not so, and ``SD_PLUGIN_CHECK=1`` asked to look.
        """
        if hint is None:
            return cls()
        operand = cls(hint.use(), hint.parts, hints.route(x, hint))
        if _check.ENABLED:
            operand.check(x.detach().reshape(hint.shape), hint.steps, "at a product")
        return operand

    @classmethod
    def drawn(cls, pattern: Kept | Tensor | None, site: str) -> Operand:
        """A pattern that the product itself applies, drawn at ``site`` and used at once."""
        if not isinstance(pattern, Kept):
            return cls(pattern)
        draw = Draw(site, pattern)
        draw.use()
        return cls(pattern, (Part(pattern, [draw]),))

    @property
    def kept(self) -> Kept | None:
        """The kept units; None for a dense product."""
        return self.pattern if isinstance(self.pattern, Kept) else None

    @property
    def is_read(self) -> bool:
        """Somebody may read the operand's gradient before the dropout does, so that it has to be whole."""
        return self.route is not None and self.route.is_read()

    def check(self, x: Tensor, steps: Steps, when: str) -> None:
        """What this operand knows of ``x``, whose rows are laid out as ``steps`` says, is so.

        Raises:
            CheckError: it is not; ``when`` is said in the message.
        """
        _check.check_zeros(x, self.parts, steps, when)

    def count(self, rows: int, columns: int, backend: str, products: int, dense: int = 0) -> None:
        """Count ``products`` products of ``rows`` activations with ``columns`` outputs; ``dense`` of them skip none."""
        for part in self.parts:
            for site in part.sites:
                stats.count_product(site, part.kept, rows * (products - dense), columns, backend)
                if dense:
                    stats.count_product(site, Kept.all(1, part.kept.size), rows * dense, columns, backend)


class _Linear(Operation):
    """``x Wᵀ + b`` visiting kept columns of ``x`` only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operand: Operand,
        steps: Steps,
        shape: tuple[int, ...],
    ) -> Tensor:
        rows = _shaped(x, shape)
        with without_autocast(x.device.type):
            packed = kernels.gemm_pack(weight.t())
            y = kernels.gemm_fp(rows, packed, operand.kept, steps, bias)
        # The tensor that it was given, which lives as long: whoever hooks it still shows at the backward pass.
        _stash.save(ctx, x, packed)
        ctx.operand, ctx.steps, ctx.shape = operand, steps, shape
        operand.count(x.shape[:-1].numel(), weight.shape[0], packed.backend.name, 1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, packed = _stash.saved(ctx)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        operand, steps, rows = ctx.operand, ctx.steps, _shaped(x, ctx.shape)
        if _check.ENABLED:
            operand.check(rows, steps, "at the backward pass")
        kept, is_read = operand.kept, needs_x and operand.is_read
        with without_autocast(x.device.type):
            dx = _shaped(kernels.gemm_bp(dy, packed, None if is_read else kept, steps), x.shape) if needs_x else None
            dweight = kernels.gemm_wg(rows, dy, kept, steps).t() if needs_weight else None
            dbias = dy.flatten(0, -2).sum(0) if needs_bias else None
        operand.count(x.shape[:-1].numel(), dy.shape[-1], packed.backend.name, needs_x + needs_weight, is_read)
        return dx, dweight, dbias, None, None, None


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x if x.shape == shape else x.reshape(shape)


def _is_worth_skipping(x: Tensor, weight: Tensor) -> bool:
    """``x`` and ``weight`` make a product that gains from it, or somebody wants its hint verified."""
    if _check.ENABLED or product_pays(x.shape[:-1].numel() * weight.numel(), x.device):
        return True
    _report.count("products of linear layers, too small to gain from skipping", f"{x.shape[-1]} units")
    return False


@opaque
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, native: bool = True) -> Tensor:
    """``torch.nn.functional.linear`` that skips the columns of ``x`` which its hint knows to be zero.

    The gradient of a skipped column is zero, which is what the dropout that zeroed it would make of it; unless somebody
    may read it before the dropout does (:mod:`sd_plugin._route`).

    Args:
        x: ``[..., K]``; weight: ``[N, K]``; bias: ``[N]`` or None.
        native: use torch's own kernels where nothing can be skipped, or too little (:mod:`sd_plugin._pays`). False
            always runs this library's.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: shapes disagree. TypeError: dtypes or devices disagree. RuntimeError: either, where torch does it.
    """
    hint = hints.lookup(x)
    if native and hint is not None and not _is_worth_skipping(x, weight):
        hints.waive(x)
        hint = None
    if native and hint is None:
        return torch.nn.functional.linear(x, weight, bias)
    shape = torch.Size((1, x.shape[:-1].numel(), x.shape[-1])) if hint is None else hint.shape
    steps = TIME_MAJOR if hint is None else hint.steps
    operand = Operand.hinted(hint, x)
    operands = cast_for_autocast(x, weight, bias)
    y: Tensor = _Linear.apply(*operands, operand, steps, shape)
    # A view only where it has to be one.
    return _shaped(y, (*x.shape[:-1], weight.shape[0]))


@dataclass
class LayerCall:
    """The part of an LSTM layer's call that is not differentiated.

    Attributes:
        input, recurrent: patterns of the two products.
        steps: which rows belong to which time step; reverse: run backwards in time.
    """

    input: Operand
    recurrent: Operand
    steps: Steps
    reverse: bool = False

    def of_kernels(self, whole_input: bool = False) -> LSTMCall:
        """As the kernels take it; ``whole_input``: products visit every column of the input."""
        return LSTMCall(None if whole_input else self.input.kept, self.recurrent.pattern, self.steps, self.reverse)

    def count(self, x: Tensor, hidden: int, backend: str, products: int) -> None:
        """Count ``products`` input products and as many recurrent ones."""
        rows = x.shape[:-1].numel()
        self.input.count(rows, 4 * hidden, backend, products)
        self.recurrent.count(rows, 4 * hidden, backend, products)


class _LSTMLayer(Operation):
    """One layer, one direction, over a sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        call: LayerCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(x.device.type):
            packed = kernels.lstm_pack(weight_ih, weight_hh, bias_ih, bias_hh)
            y, h_n, c_n, saved = kernels.lstm_forward(packed, x, (h0, c0), call.of_kernels())
        _stash.save(ctx, x, saved, packed)
        ctx.call = call
        call.count(x, packed.hidden_size, packed.backend.name, 1)
        return y, h_n, c_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh_n: Tensor, dc_n: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, packed = _stash.saved(ctx)
        needs_x, _, _, needs_weight_ih, needs_weight_hh, needs_bias_ih, needs_bias_hh, _ = ctx.needs_input_grad
        wanted = Wanted(needs_x, needs_weight_ih, needs_weight_hh, needs_bias_ih or needs_bias_hh)
        gradients = LSTMResultGradients(dy, dh_n, dc_n)
        grads, _ = layer_gradients(ctx.call, packed, x, saved, gradients, wanted)
        return (
            grads.x,
            grads.h0,
            grads.c0,
            grads.weight_ih,
            grads.weight_hh,
            grads.bias if needs_bias_ih else None,
            # A copy: torch may accumulate into the tensor it is given.
            grads.bias.clone() if needs_bias_hh and grads.bias is not None else None,
            None,
        )


def layer_gradients(
    call: LayerCall,
    packed: PackedWeights,
    x: Tensor,
    saved: Any,
    gradients: LSTMResultGradients,
    wanted: Wanted,
) -> tuple[LSTMGradients, Kept | None]:
    """What autograd asks of a layer: :func:`sd_plugin.kernels.lstm_backward`, checked and counted.

    Returns:
        The gradients, and the columns of ``x`` that its products visit (None: all of them).
    """
    if _check.ENABLED:
        call.input.check(x, call.steps, "at the backward pass")
    # A dense gradient of the weight, too, then, to which zeros add nothing.
    is_read = wanted.x and call.input.is_read
    of_kernels = call.of_kernels(whole_input=is_read)
    with without_autocast(x.device.type):
        grads = kernels.lstm_backward(packed, x, saved, gradients, of_kernels, wanted)
    hidden, backend = packed.hidden_size, packed.backend.name
    rows, products = x.shape[:-1].numel(), wanted.x + (wanted.weight_ih or wanted.gates)
    call.input.count(rows, 4 * hidden, backend, products, products if is_read else 0)
    call.recurrent.count(rows, 4 * hidden, backend, 1 + (wanted.weight_hh or wanted.gates))
    return grads, of_kernels.input


@opaque
def lstm_layer(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    call: LayerCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer, one direction; see :func:`sd_plugin.kernels.lstm_forward` for the equations.

    Args:
        x: as ``call.steps`` says, dropped and scaled already.
        state: ``h_0`` and ``c_0``, ``[B, H]``.
        parameters: ``weight_ih [4H, I]``, ``weight_hh [4H, H]``, ``bias_ih`` and ``bias_hh`` ``[4H]`` or None.

    Returns:
        ``y`` (rows of ``x``, ``H`` columns), ``h_n`` and ``c_n`` ``[B, H]``.

    Raises:
        ValueError: shapes, steps or sizes disagree. TypeError: dtypes or devices disagree.
    """
    x, *rest = cast_for_autocast(x, *state, *parameters)  # type: ignore[assignment]
    if isinstance(call.recurrent.pattern, torch.Tensor):
        call.recurrent.pattern = call.recurrent.pattern.to(x.dtype)
    y, h_n, c_n = _LSTMLayer.apply(x, *rest, call)
    return y, h_n, c_n


def pack_parameters(
    parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> PackedWeights:
    """Pack a layer's parameters once for several :func:`lstm_layer` calls under the same autocast state."""
    with torch.no_grad():
        weight_ih, weight_hh, bias_ih, bias_hh = cast_for_autocast(*parameters)
        assert weight_ih is not None and weight_hh is not None
        return kernels.lstm_pack(weight_ih, weight_hh, bias_ih, bias_hh)
