"""What stands in for the ``forward`` of `nn.Dropout`, `nn.LSTM` and `nn.Linear`.

Each asks first what most calls are left to torch for: eval mode, and a compiler that reads along.
"""

from __future__ import annotations

import functools
import gc
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sd_plugin._report import count

from . import _hints
from ._capture import compiler, is_traced, is_watched
from ._classes import dropout_change, is_structured, lstm_change
from ._living import lstms
from ._packed import rows
from ._settings import Settings

if TYPE_CHECKING:
    from sd_plugin.kernels import Steps

WATCHED = "calls under torch.compile, torch.jit.trace, torch.export, torch.func or a dispatch mode"
#: Widths of the activations whose layout was asked for in a warning.
warned: set[int] = set()


def dropout_forward(settings: Settings, stock: Any) -> Any:
    """``nn.Dropout.forward``: activations of an LSTM's width lose whole units."""

    @functools.wraps(stock)
    def forward(self: nn.Dropout, input: Tensor) -> Any:
        if not self.training or is_traced():
            return stock(self, input)
        if compiler() is not None:
            count(WATCHED)
            return stock(self, input)
        steps = _dropout_steps(self, input, settings)
        return stock(self, input) if steps is None else _drop(self, input, steps, settings)

    return forward


def _dropout_steps(module: nn.Dropout, input: Tensor, settings: Settings) -> Steps | None:
    """Which rows of the input belong to which time step; None if the dropout is left to torch."""
    # Case I is torch's own dropout.
    if not 0 < module.p < 1 or settings.case == "I":
        return None
    if dropout_change(type(module)):
        count("calls of subclasses of nn.Dropout with a forward of their own", type(module).__name__)
    elif type(input) is not Tensor or not input.is_floating_point():
        count("calls of nn.Dropout on tensors of another kind", type(input).__name__)
    elif input.dim() == 3:
        batch_first = _batch_first(settings, input.shape[-1])
        if batch_first is not None and not _is_left_to_watchers():
            from sd_plugin.kernels import Steps

            return Steps(int(batch_first))
    elif input.dim() == 2:
        steps = rows.steps(input)
        if steps is None:
            count("calls of nn.Dropout on 2-D activations, whose time steps are not known")
        elif _is_a_width(input.shape[-1]) and not _is_left_to_watchers():
            return steps
    else:
        count("calls of nn.Dropout on activations of other than three dimensions", f"{input.dim()}-D")
    return None


def _is_a_width(width: int) -> bool:
    """Some LSTM that can use a hint has it."""
    if lstms.layouts(width):
        return True
    count("calls of nn.Dropout on activations of a width that no usable nn.LSTM has", f"{width} units")
    return False


def _is_left_to_watchers() -> bool:
    if is_watched():
        count(WATCHED)
        return True
    return False


def _batch_first(settings: Settings, width: int) -> bool | None:
    """The layout of activations of this width; None if no LSTM has that width, or if they leave it open."""
    layouts = lstms.layouts(width)
    if len(layouts) > 1 and settings.batch_first is None and not warned:
        # The program may be done with some of them already.
        gc.collect()
        layouts = lstms.layouts(width)
    if not _is_a_width(width):
        return None
    if settings.batch_first is not None:
        return settings.batch_first
    if len(layouts) == 1:
        return next(iter(layouts))
    count("calls of nn.Dropout on activations whose LSTMs differ in batch_first", f"{width} units")
    if not warned:
        warned.add(width)
        warnings.warn(
            f"sd-plugin: dropout of {width} units stays torch's own: LSTMs of that width differ in batch_first; "
            "enable('torch_nn', batch_first=…) says which it is",
            stacklevel=6,
        )
    return None


def _drop(module: nn.Dropout, input: Tensor, steps: Steps, settings: Settings) -> Tensor:
    from sd_plugin import functional, hints

    site = f"dropout {input.shape[-1]}"
    dropped = functional.dropout(input, module.p, settings.case, steps, sampling=settings.sampling, site=site)
    if module.inplace:
        # The program may go on with its own reference to the input.
        dropped = hints.carry(dropped, steps, input.copy_(dropped), steps)
    _hints.note_probability(dropped, module.p)
    return dropped


def lstm_forward(settings: Settings, stock: Any) -> Any:
    """``nn.LSTM.forward``: skips what was dropped of its input, drops between its layers and of its states."""

    @functools.wraps(stock)
    def forward(self: nn.LSTM, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        if not self.training or is_traced():
            return stock(self, input, hx)
        if compiler() is not None:
            count(WATCHED)
            return stock(self, input, hx)
        options = _lstm_options(self, input, settings)
        if options is None:
            return stock(self, input, hx)
        from .._lstm import structured

        return structured(self, **options).forward(input, hx)

    return forward


def _lstm_options(lstm: nn.LSTM, input: Tensor | PackedSequence, settings: Settings) -> dict[str, Any] | None:
    """How this call drops units; None if it drops none and skips none, or in a way that only torch knows."""
    cls = type(lstm)
    # This library's own LSTM has called on torch's kernels.
    if is_structured(cls):
        return None
    lstms.check(lstm)
    data = input.data if isinstance(input, PackedSequence) else input
    change = lstm_change(cls)
    if change:
        count("calls of subclasses of nn.LSTM that have changed more than forward", f"{cls.__name__}.{change}")
    elif lstm.proj_size:
        count("calls of nn.LSTM with proj_size")
    elif type(data) is not Tensor or not 0 <= lstm.dropout < 1:
        count("calls of nn.LSTM on tensors of another kind, or with dropout=1")
    else:
        return _chosen(lstm, data, settings)
    return None


def _chosen(lstm: nn.LSTM, data: Tensor, settings: Settings) -> dict[str, Any] | None:
    hint = _hints.find(data)
    # With one layer there is no place for it.
    between = lstm.dropout if lstm.num_layers > 1 else 0.0
    recurrent = 0.0
    if settings.recurrent:
        around = between or _hints.probability(hint)
        recurrent = around if settings.recurrent_dropout is None else settings.recurrent_dropout
    if hint is None and not between and not recurrent:
        count("calls of nn.LSTM with no structured dropout before it, and none of its own")
        return None
    if _is_left_to_watchers():
        return None
    return settings.lstm(recurrent, f"lstm {lstm.input_size}x{lstm.hidden_size}")


def linear_forward(stock: Any) -> Any:
    """``nn.Linear.forward``: skips what was dropped of its input."""

    @functools.wraps(stock)
    def forward(self: nn.Linear, input: Tensor) -> Any:
        # In this order: most calls have no hint, and looking up a module's parameters takes its time.
        watched = is_traced() or compiler() is not None
        if not watched and _hints.find(input) is not None and are_ordinary(self.weight, self.bias):
            from sd_plugin import functional

            return functional.linear(input, self.weight, self.bias)
        return stock(self, input)

    return forward


def are_ordinary(weight: Any, bias: Any) -> bool:
    """They are such as this library's products take, and nobody watches."""
    kinds = (Tensor, nn.Parameter)
    ordinary = type(weight) in kinds and weight.dim() == 2 and (bias is None or type(bias) in kinds)
    return ordinary and not is_watched()
