"""What a training shows while an epoch runs: a bar on a terminal, else a line a minute."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

#: Seconds between two updates of the bar, and between two lines.
BAR_SECONDS, LINE_SECONDS = 1.0, 60.0


def perplexity(nats: float, words: int) -> float:
    """exp of the mean loss, in nats, of a word; infinite where that is more than a float holds, or no number."""
    mean = nats / words
    return math.exp(mean) if mean < 700 else math.inf


def clock(seconds: float) -> str:
    """A duration as ``3:20`` (minutes) or ``1:03:20`` (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class EpochDisplay:
    """Shows how an epoch goes; a context manager, which takes the bar away at its end.

    Args:
        title: what the epoch is called.
        steps: how many it has; words: of one step, those of all processes.
        epochs_left: epochs of this many steps that follow.
        console: where to show it; None shows nothing.
    """

    def __init__(self, title: str, steps: int, words: int, epochs_left: int, console: Console | None) -> None:
        self._title, self._steps, self._words, self._epochs_left = title, steps, words, epochs_left
        self._console = console
        self._every = BAR_SECONDS if console is not None and console.is_terminal else LINE_SECONDS
        self._done = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "EpochDisplay":
        self._start = self._told = time.monotonic()
        if self._console is not None and self._console.is_terminal:
            columns = (TextColumn(self._title), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True, redirect_stdout=False)
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, nats: Tensor, scored: int) -> None:
        """A step is done.

        Args:
            nats: loss of this epoch so far, on whatever device: read only when something is to be shown, since reading
                waits for the device.
            scored: words of one step that are in ``nats``: those of this process.
        """
        self._done += 1
        now = time.monotonic()
        if self._console is None or now - self._told < self._every:
            return
        self._told = now
        self._show(perplexity(nats.item(), self._done * scored), now - self._start)

    def _show(self, perplexity: float, seconds: float) -> None:
        assert self._console is not None
        left = seconds / self._done * (self._steps - self._done)
        whole = left + seconds / self._done * self._steps * self._epochs_left
        text = (
            f"perplexity {perplexity:.1f}, {self._done * self._words / seconds:,.0f} words/s, "
            f"{clock(left)} left, {clock(whole)} in all"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        else:
            self._console.print(f"{self._title}: step {self._done:,} of {self._steps:,}, {text}")
