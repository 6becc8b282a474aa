"""Interleaved timing: what is compared is run in turns, so that a machine that slows down slows all of it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Samples:
    """What the timed runs of one column gave.

    Attributes:
        ms: milliseconds of each run, in order.
        values: what each run returned.
    """

    ms: list[float] = field(default_factory=list)
    values: list[object] = field(default_factory=list)


@dataclass(frozen=True)
class Clock:
    """How to time.

    Attributes:
        repeats: timed rounds; warmup: rounds before them that are not kept.
        synchronize: waits until the device has done everything it was given.
        shortest: a sample of :meth:`loop` lasts at least about this many milliseconds.
        tick: called after every round.
    """

    repeats: int
    warmup: int
    synchronize: Callable[[], object] = lambda: None
    shortest: float = 2.0
    tick: Callable[[], object] = lambda: None

    @classmethod
    def of(cls, device: torch.device, repeats: int, warmup: int, **options: Any) -> Clock:
        """A clock for work on ``device``."""
        if device.type != "cuda":
            return cls(repeats, warmup, **options)
        import torch

        return cls(repeats, warmup, torch.cuda.synchronize, **options)

    def _run(self, run: Callable[[], object], loops: int = 1) -> tuple[float, object]:
        """Milliseconds of one of ``loops`` runs, and what the last one returned."""
        value: object = None
        self.synchronize()
        start = time.perf_counter()
        for _ in range(loops):
            value = run()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start) / loops, value

    def interleave(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, Samples]:
        """Run everything in turns, each turn beginning with another column, and time it."""
        gc.collect()
        gc.freeze()  # what exists by now need not be looked at again before each round
        try:
            return self._rounds(runs, 1, steps=True)
        finally:
            gc.unfreeze()

    def loop(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """As :meth:`interleave`, for short runs: each sample is the mean of several, as many for each column."""
        fastest = max(1e-6, min(self._run(run)[0] for run in runs.values()))
        loops = min(1000, max(1, math.ceil(self.shortest / fastest)))
        return {name: samples.ms for name, samples in self._rounds(runs, loops, steps=False).items()}

    def _rounds(self, runs: Mapping[str, Callable[[], object]], loops: int, steps: bool) -> dict[str, Samples]:
        """The rounds; only of ``steps`` values are kept (a product's is large) and garbage collected between."""
        names, samples = list(runs), {name: Samples() for name in runs}
        for round_ in range(self.warmup + self.repeats):
            if steps:
                gc.collect()
            first = round_ % len(names)
            with _no_collection():
                for name in (*names[first:], *names[:first]):
                    ms, value = self._run(runs[name], loops)
                    if round_ >= self.warmup:
                        samples[name].ms.append(ms)
                        samples[name].values += [value] if steps else []
            self.tick()
        return samples


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
