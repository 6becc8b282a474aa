#!/usr/bin/env python
"""scripts/zaremba_main.py, with mode ``random`` on this library's dense kernels instead of PyTorch's own.

Its arguments are those of zaremba_main.py, and so is the mathematics: the same masks from the same seed, the same
losses to rounding. On a CPU it takes about two thirds of the time. It is a baseline of quality; speed is compared with
PyTorch's own modules, which zaremba_main.py uses.
"""

import sys
from pathlib import Path

if not __package__:
    # As a program: its siblings are in the folder above. This one's modules have names that other libraries import.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import zaremba_main
from torch import Tensor, nn
from training_settings import Settings

from sd_plugin import FusedCrossEntropyLoss, StructuredDropoutLSTM
from sd_plugin.bench.layers import DenseLinear
from sd_plugin.kernels import Steps


class DenseLSTM(StructuredDropoutLSTM):
    """The dense kernels, with the dropout between layers drawn as ``nn.LSTM`` draws it: the same random numbers."""

    def _drop(self, x: Tensor, p: float, steps: Steps, where: str) -> Tensor:
        return nn.functional.dropout(x, p, self.training)


class DenseBaseline(zaremba_main.LanguageModel):
    """The baseline, its modules changed in place: parameters and random numbers stay what they are."""

    def __init__(self, vocabulary: int, settings: Settings) -> None:
        super().__init__(vocabulary, settings)
        if settings.mode == "random":
            DenseLSTM.adopt(self.lstm, mode="random", native=False)
            DenseLinear.adopt(self.projection)
            self.loss = FusedCrossEntropyLoss(reduction="sum")


if __name__ == "__main__":
    zaremba_main.LanguageModel = DenseBaseline
    zaremba_main.app()
