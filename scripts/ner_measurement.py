"""What a training of targer takes and brings: its BiLSTM's time, and a row of measurements for each epoch.

Nothing here changes what is computed.
"""

import csv
import functools
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import run_folder
import torch
from torch import Tensor
from whole_file import write_whole


@dataclass(frozen=True)
class Epoch:
    """Measurements of one epoch; the host evaluates once before the first, which is its epoch 0.

    Attributes:
        train_loss: mean negative log-likelihood of a sentence; train_f1, dev_f1, test_f1: in percent, by the host.
        batches: of training.
        training_s: seconds of all training steps: forward, backward, update, and the making of batches.
        evaluation_s: seconds in which the three parts were evaluated.
        lstm_forward_s, lstm_backward_s: seconds of ``training_s`` that the BiLSTM took, packing included. The latter
            is None where no gradient reaches the BiLSTM's input, since then its end cannot be seen.
    """

    epoch: int
    train_loss: float
    train_f1: float
    dev_f1: float
    test_f1: float
    batches: int
    training_s: float
    evaluation_s: float
    lstm_forward_s: float
    lstm_backward_s: float | None


class LayerTimer:
    """Seconds that a layer takes while it trains.

    The backward pass of a layer is what the autograd engine does from the moment at which the gradient of the layer's
    output is complete until that of its input is. On a CPU that is the layer alone: the engine takes the operations
    one by one, those created later first. On a GPU the device is waited for at these moments, so that times are true
    but the whole step a little slower.

    Attributes:
        forward_s, backward_s: seconds; the latter None if any backward pass could not be seen.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.forward_s = 0.0
        self.backward_s: float | None = 0.0

    def around(self, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The ``forward`` of a layer's class, timed in training; its first argument is its input."""

        @functools.wraps(stock)
        def forward(layer: Any, x: Tensor, *args: Any) -> Tensor:
            if not layer.training or not torch.is_grad_enabled():
                return stock(layer, x, *args)
            started = self._now(x)
            y = stock(layer, x, *args)
            self.forward_s += self._now(y) - started
            self._time_backward(x, y)
            return y

        return forward

    def _time_backward(self, x: Tensor, y: Tensor) -> None:
        if not x.requires_grad:
            self.backward_s = None
            return
        started = 0.0

        def begin(gradient: Tensor) -> None:
            nonlocal started
            started = self._now(gradient)

        def end(gradient: Tensor) -> None:
            if self.backward_s is not None:
                self.backward_s += self._now(gradient) - started

        y.register_hook(begin)
        x.register_hook(end)

    def _now(self, tensor: Tensor) -> float:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        return self._clock()


class Log:
    """Rows of measurements, written to a file after each epoch.

    Attributes:
        path: the file, comma-separated with a header; rows: what is in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Epoch] = []
        self._lstm = LayerTimer()
        self._begin()

    def _begin(self) -> None:
        self._batches, self._training_s, self._evaluation_s = 0, 0.0, 0.0
        self._lstm.reset()

    def attach(self) -> None:
        """Wrap the host's functions that begin and end what is measured."""
        from src.classes.datasets_bank import DatasetsBank, DatasetsBankSorted
        from src.classes.report import Report
        from src.evaluators.evaluator_base import EvaluatorBase
        from src.layers.layer_bilstm import LayerBiLSTM

        for bank in (DatasetsBank, DatasetsBankSorted):
            bank.get_train_batches = self._around_batches(bank.get_train_batches)
        EvaluatorBase.get_evaluation_score_train_dev_test = self._around_evaluation(
            EvaluatorBase.get_evaluation_score_train_dev_test
        )
        Report.write_epoch_scores = self._around_report(Report.write_epoch_scores)
        LayerBiLSTM.forward = self._lstm.around(LayerBiLSTM.forward)

    def _around_batches(self, stock: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(stock)
        def get_train_batches(bank: Any, batch_size: int) -> Iterator[Any]:
            # A generator: what lies between its first and its last batch is the training.
            started = time.perf_counter()
            for batch in stock(bank, batch_size):
                yield batch
                self._batches += 1
            self._training_s = time.perf_counter() - started

        return get_train_batches

    def _around_evaluation(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def get_evaluation_score_train_dev_test(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            scores = stock(*args, **kwargs)
            self._evaluation_s = time.perf_counter() - started
            return scores

        return get_evaluation_score_train_dev_test

    def _around_report(self, stock: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(stock)
        def write_epoch_scores(report: Any, epoch: int, scores: tuple[float, float, float, float]) -> None:
            stock(report, epoch, scores)
            self._end(epoch, *scores)

        return write_epoch_scores

    def _end(self, epoch: int, loss: float, train: float, dev: float, test: float) -> None:
        lstm = self._lstm
        backward = lstm.backward_s if lstm.backward_s is None else round(lstm.backward_s, 4)
        row = Epoch(
            epoch=epoch,
            # The host reports a hundred times the mean.
            train_loss=round(loss / 100, 6),
            train_f1=train,
            dev_f1=dev,
            test_f1=test,
            batches=self._batches,
            training_s=round(self._training_s, 4),
            evaluation_s=round(self._evaluation_s, 4),
            lstm_forward_s=round(lstm.forward_s, 4),
            lstm_backward_s=backward,
        )
        self.rows.append(row)
        self._begin()
        write_whole(self.path, self._text())
        run_folder.has_result(self.path.parent)

    def _text(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def summary(self) -> str:
        """The time of a training epoch and the BiLSTM's part of it, in a line."""
        trained = [row for row in self.rows if row.batches]
        if not trained:
            return "no epoch was trained"
        whole = sum(row.training_s for row in trained) / len(trained)
        forward = sum(row.lstm_forward_s for row in trained) / len(trained)
        told = f"training {whole:.2f} s an epoch (mean of {len(trained)}), of which the BiLSTM: {forward:.2f} s forward"
        backwards = [row.lstm_backward_s for row in trained if row.lstm_backward_s is not None]
        if len(backwards) < len(trained):
            return f"{told}; no gradient reaches its input, so that its backward pass cannot be told apart"
        backward = sum(backwards) / len(backwards)
        return f"{told}, {backward:.2f} s backward ({100 * (forward + backward) / whole:.0f}%)"
