"""Gives an already built model structured dropout."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .lstm import StructuredDropoutLSTM

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, **options: Any) -> Model:
    """Make each ``nn.LSTM`` inside ``model`` a :class:`StructuredDropoutLSTM`, in place.

    The objects stay the same ones, so optimizers, checkpoints, hooks and other references to them stay valid.
    Subclasses of ``nn.LSTM`` are left alone, since their ``forward`` may mean something else. An LSTM that was
    converted before is configured anew.

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
    """
    kinds = (nn.LSTM, StructuredDropoutLSTM)
    found = {name: module for name, module in model.named_modules() if type(module) in kinds}
    if not found:
        raise ValueError(f"{type(model).__name__} holds no nn.LSTM to convert")
    sited = {name: {"site": name or "lstm", **options} for name in found}
    for name, lstm in found.items():
        StructuredDropoutLSTM.from_lstm(lstm, **sited[name])
    for name, lstm in found.items():
        StructuredDropoutLSTM.adopt(lstm, **sited[name])
    return model
