"""Gives an already built model structured dropout."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .lstm import StructuredDropoutLSTM

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, **options: Any) -> Model:
    """Replace each ``nn.LSTM`` inside ``model``, in place, by a :class:`StructuredDropoutLSTM` on its parameters.

    Optimizers, checkpoints and hooks stay valid: parameters are the same objects under the same names. Subclasses of
    ``nn.LSTM`` are left alone, since their ``forward`` may mean something else.

    Args:
        model: any module; if it is itself an ``nn.LSTM``, use the returned module in its stead.
        **options: ``recurrent_dropout``, ``input_dropout``, ``output_dropout``, ``mode``, ``locked``, ``sampling``,
            ``native`` as of :class:`StructuredDropoutLSTM`, the same for every LSTM. Sites in the report are the
            modules' names.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` holds no ``nn.LSTM``, or an option is out of range (nothing is replaced then).
        NotImplementedError: an LSTM has projections (nothing is replaced then).
    """
    found = {name: module for name, module in model.named_modules() if type(module) is nn.LSTM}
    if not found:
        raise ValueError(f"{type(model).__name__} holds no nn.LSTM to convert")
    made = {
        id(lstm): StructuredDropoutLSTM.from_lstm(lstm, **{"site": name or "lstm", **options})
        for name, lstm in found.items()
    }
    for parent in list(model.modules()):
        # Not named_children(), which leaves out the second name of a child that has two.
        for name, child in list(parent._modules.items()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    return made.get(id(model), model)  # type: ignore[return-value]
