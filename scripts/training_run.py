"""A training from epoch to epoch: each is trained, measured, saved and told."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from training_display import EpochDisplay, clock
from training_state import RunFolder

import sd_plugin
from sd_plugin import stats

if TYPE_CHECKING:
    from zaremba_main import Training

_out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print for whoever reads the results: on standard output."""
    _out.print(text)


def warn(text: str) -> None:
    """Print what is no result: on standard error."""
    _err.print(text)


class DivergenceError(Exception):
    """The loss is no longer finite."""


@dataclasses.dataclass
class Run:
    """A training, its folder, and the rows of its log.

    Attributes:
        name: what the model is called in the log.
        rows: one for each epoch, by the names of its columns.
    """

    name: str
    training: Training
    folder: RunFolder
    identity: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def resume(self) -> None:
        """Continue from the folder's checkpoint.

        Raises:
            UsageError: there is none that this training can go on from. OSError: a file cannot be read or written.
        """
        state = self.folder.load(self.identity)
        try:
            self.training.restore(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            # Which is this one's first act: nothing was trained or written yet.
            raise self.folder.broken(str(error) or type(error).__name__) from None
        self.rows = state["log"]
        if self.training.processes.leads:
            # A run that was killed between checkpoint and log left the log a row short.
            self.folder.write_log(self.rows)

    def epoch(self, stop: int) -> None:
        """Train an epoch, of which ``stop`` is the last to come, measure it, and save.

        Raises:
            DivergenceError: the loss is no longer finite; nothing is saved. OSError: likewise, the file system refused.
        """
        row = self._measured(stop)
        if float("inf") in (row["train_perplexity"], row["valid_perplexity"]):
            raise DivergenceError(
                f"epoch {row['epoch']}: the loss is no longer finite; {self.folder.path} stays as it was"
            )
        self.rows.append(row)
        state = self.training.state()
        if self.training.processes.leads:
            self.folder.save({"identity": self.identity, **state, "log": self.rows})
            say(
                f"epoch {row['epoch']:2} of {row['epochs']}  learning rate {row['learning_rate']:.4f}  "
                f"perplexity: train {row['train_perplexity']:8.2f}  valid {row['valid_perplexity']:8.2f}  "
                f"{clock(row['seconds'])}  {row['words_per_second']:,.0f} words/s  skipped {row['skipped']:.1%}"
            )

    def _measured(self, stop: int) -> dict[str, Any]:
        """The row of the next epoch, which is trained."""
        training, settings, processes = self.training, self.training.settings, self.training.processes
        epoch = training.epoch + 1
        words = settings.sequence_length * settings.batch_size
        title = f"epoch {epoch} of {settings.epochs}"
        console = _err if processes.leads else None
        skipped_before, _ = training.skipped()
        started = time.monotonic()
        with EpochDisplay(title, training.steps, words, stop - epoch, console) as display:
            train_perplexity = training.train(display)
        seconds = time.monotonic() - started
        skipped, whole = training.skipped()
        return {
            "name": self.name,
            "mode": settings.mode,
            "seed": settings.seed,
            "epoch": epoch,
            "epochs": settings.epochs,
            "learning_rate": settings.learning_rate_of(epoch),
            "train_perplexity": train_perplexity,
            "valid_perplexity": training.evaluate("valid"),
            "seconds": round(seconds, 3),
            "words_per_second": round(training.steps * words / seconds, 1),
            "skipped": (skipped - skipped_before) / whole,
        }

    def finish(self) -> None:
        """Measure the test perplexity of the last epoch, and tell and write what came out."""
        test = self.training.evaluate("test")
        if not self.training.processes.leads:
            return
        last = self.rows[-1]
        machine = {
            "device": str(self.training.processes.device),
            "processes": self.training.processes.count,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sd_plugin": sd_plugin.__version__,
        }
        self.folder.write_result({**last, "test_perplexity": test, **machine})
        say(f"after epoch {last['epoch']} of {last['epochs']}: test perplexity {test:.2f}")
        if last["mode"] == "random":
            say("random dropout: its products cannot skip anything")
        elif stats.sites():
            # Of this process alone, and since it was started; empty if no epoch was left to train.
            say(sd_plugin.report())
        say(f"{self.folder.path} holds {', '.join(path.name for path in self.folder.files)}")
