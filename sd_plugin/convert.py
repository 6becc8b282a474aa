"""Gives an already built model structured dropout, and takes it away again."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .dropout import StructuredDropout
from .linear import StructuredLinear
from .loss import FusedCrossEntropyLoss
from .lstm import OPTIONS, StructuredDropoutLSTM

Model = TypeVar("Model", bound=nn.Module)

#: Class of ours -> torch's, and what ours adds to an object. Classes made for a host have a method `_to_stock` instead.
_STOCK: dict[type, tuple[type, tuple[str, ...]]] = {
    StructuredDropoutLSTM: (nn.LSTM, tuple(OPTIONS.values())),
    StructuredLinear: (nn.Linear, ()),
    StructuredDropout: (nn.Dropout, ("case", "batch_first", "sampling", "site")),
    FusedCrossEntropyLoss: (nn.CrossEntropyLoss, ()),
}


def convert(model: Model, **options: Any) -> Model:
    """Make each ``nn.LSTM`` inside ``model`` a :class:`StructuredDropoutLSTM`, in place.

    The objects stay the same ones, so optimizers, checkpoints, hooks and other references to them stay valid.
    An LSTM that was converted before is configured anew. Left alone, and named in a warning, are subclasses of
    ``nn.LSTM``, since their ``forward`` may mean something else, and parametrized LSTMs, whose class is torch's own
    make: convert first, then parametrize.

    Args:
        model: any module, or an ``nn.LSTM`` itself.
        **options: ``recurrent_dropout``, ``input_dropout``, ``output_dropout``, ``mode``, ``locked``, ``sampling``,
            ``native`` as of :class:`StructuredDropoutLSTM`, the same for every LSTM. Sites in the report are the
            modules' names.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` holds no ``nn.LSTM``, or an option is out of range. TypeError: an option is unknown.
        NotImplementedError: an LSTM has projections. Nothing is converted then.

    >>> import torch, sd_plugin
    >>> model = sd_plugin.convert(torch.nn.Sequential(torch.nn.LSTM(8, 16)), recurrent_dropout=0.5)
    >>> type(model[0]).__name__
    'StructuredDropoutLSTM'
    """
    lstms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LSTM)}
    found = {name: lstm for name, lstm in lstms.items() if _unparametrized(lstm) in (nn.LSTM, StructuredDropoutLSTM)}
    # Of a parametrized one torch has made the class, from that of before.
    found = {name: lstm for name, lstm in found.items() if isinstance(lstm, StructuredDropoutLSTM) or _is_plain(lstm)}
    left = [f"{name or 'itself'} ({_why_left(lstm)})" for name, lstm in lstms.items() if name not in found]
    if not found:
        told = f"; left alone: {', '.join(left)}" if left else ""
        raise ValueError(f"{type(model).__name__} holds no nn.LSTM to convert{told}")
    sited = {name: {"site": name or "lstm", **options} for name in found}
    for name, lstm in found.items():
        StructuredDropoutLSTM.from_lstm(lstm, **sited[name])
    for name, lstm in found.items():
        StructuredDropoutLSTM.adopt(lstm, **sited[name])
    if left:
        warnings.warn(f"sd_plugin.convert left alone: {', '.join(left)}", stacklevel=2)
    return model


def to_stock(model: Model) -> Model:
    """Make every module of this library inside ``model`` torch's own again, in place: the inverse of :func:`convert`.

    For what knows torch's classes by name, or records a model in training: ``quantize_dynamic``, Opacus,
    ``torch.jit.script``. It also serves models built of our modules. The objects stay the same ones, with their
    parameters, hooks and training flags; a dropout keeps its probability and is at random again, and what only ours
    has, such as recurrent dropout, is gone. Encoders, decoders and cells made for OpenNMT-py become OpenNMT-py's.

    Args:
        model: any module, or one of ours itself. One that holds nothing of ours is left as it is.

    Returns:
        ``model``.

    Raises:
        TypeError: a :class:`StackedStructuredLSTM` is in it, and OpenNMT-py, of which the stock class is, cannot be
            imported. Nothing is changed then.

    Subclasses of our classes are left alone, and named in a warning. A checkpoint on disk: ``sd-plugin to-stock``.

    >>> import torch, sd_plugin
    >>> model = torch.nn.Sequential(sd_plugin.StructuredDropout(0.5), sd_plugin.StructuredLinear(8, 16))
    >>> sd_plugin.to_stock(model)
    Sequential(
      (0): Dropout(p=0.5, inplace=False)
      (1): Linear(in_features=8, out_features=16, bias=True)
    )
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if "_check_to_stock" in vars(type(module)):
            type(module)._check_to_stock(name)
    left = []
    for name, module in modules.items():
        kind = _unparametrized(module)
        if kind in _STOCK:
            _make_stock(module, *_STOCK[kind])
        # One that is inside another of ours may have been changed by that.
        elif "_to_stock" in vars(kind):
            module._to_stock()
        elif isinstance(module, tuple(_STOCK)) or hasattr(kind, "_to_stock"):
            left.append(f"{name or 'itself'} ({kind.__name__} is a subclass of one of ours)")
    if left:
        warnings.warn(f"sd_plugin.to_stock left alone: {', '.join(left)}", stacklevel=2)
    return model


def _unparametrized(module: nn.Module) -> type:
    """The class of ``module``, before `torch.nn.utils.parametrize` made one of its own for it."""
    return type(module) if _is_plain(module) else type(module).__bases__[0]


def _is_plain(module: nn.Module) -> bool:
    return not is_parametrized(module)


def _why_left(lstm: nn.LSTM) -> str:
    kind = _unparametrized(lstm)
    if kind is nn.LSTM:
        return "parametrized already: convert first, then parametrize"
    return f"{kind.__name__} is a subclass of {kind.__base__.__name__ if kind.__base__ else 'nn.LSTM'}"


def _make_stock(module: nn.Module, stock: type, added: tuple[str, ...]) -> None:
    if _is_plain(module):
        module.__class__ = stock
    else:
        # As parametrize makes one, with the properties that it has put into the present one.
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{stock.__name__}", (stock,), own)
    for name in added:
        module.__dict__.pop(name, None)
