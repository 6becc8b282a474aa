"""Measures what was asked for, workload by workload, and hands the growing document over after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from .. import kernels, stats
from . import machine, memory, phases, precision, sweeps
from .columns import COLUMNS, FP32
from .folders import without_folders
from .registry import WORKLOADS
from .results import KIND, SCHEMA, Document
from .timing import Clock, Samples
from .workload import Setup, Workload


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        workloads, columns, precisions: names, in the order of the tables.
        device: ``cpu`` or ``cuda``; threads: of torch, and so of the backend.
        repeats, warmup: rounds that are kept, and rounds before them.
        memory, phases, sweeps: what to measure beside the training steps.
        tiny: shapes for tests of the program.
        hosts: checkouts of host programs by name.
        command: how this was asked for, for the file.
    """

    workloads: Sequence[str]
    columns: Sequence[str] = COLUMNS
    precisions: Sequence[str] = (FP32,)
    device: str = "cpu"
    threads: int = 1
    repeats: int = 10
    warmup: int = 2
    seed: int = 1
    memory: bool = True
    phases: bool = True
    sweeps: bool = False
    tiny: bool = False
    hosts: Mapping[str, Path] = field(default_factory=dict)
    command: str = ""

    def setup(self) -> Setup:
        """How workloads are built, in the first precision."""
        return Setup(torch.device(self.device), self.seed, self.tiny, hosts=self.hosts, precision=self.precisions[0])

    def columns_of(self, workload: Workload) -> list[str]:
        """The wanted columns that ``workload`` has."""
        return [column for column in self.columns if column in workload.columns]

    def describe(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "workloads": list(self.workloads),
            "columns": list(self.columns),
            "precisions": list(self.precisions),
            "device": self.device,
            "threads": self.threads,
            "repeats": self.repeats,
            "warmup": self.warmup,
            "seed": self.seed,
            "hosts": sorted(self.hosts),
        }


#: Told what is measured now, and then after each part of it that is done.
Tell = Callable[[str | None], object]


def parts(settings: Settings) -> int:
    """How often ``run`` tells that a part is done."""
    rounds, setup, count = settings.warmup + settings.repeats, settings.setup(), 0
    for name in settings.workloads:
        workload = WORKLOADS[name]
        each = rounds + settings.memory * len(settings.columns_of(workload))
        each += settings.phases * len(workload.products(setup))
        count += each * len(settings.precisions)
    return count + settings.sweeps * len(list(sweeps.points(setup)))


def run(settings: Settings, tell: Tell, keep: Callable[[Document], object]) -> Document:
    """Measure everything.

    Args:
        tell: called with a title when something new begins, and with None :func:`parts` times.
        keep: called with the document so far after every workload, and at the end with the whole.
    """
    torch.set_num_threads(settings.threads)
    setup, clock = settings.setup(), _clock(settings, tell)
    document = _head(settings)
    for name in settings.workloads:
        tell(WORKLOADS[name].title)
        document["workloads"][name] = _workload(WORKLOADS[name], settings, setup, clock, tell)
        keep(document)
    if settings.sweeps:
        tell("sweeps")
        for axis, value, point in sweeps.points(setup):
            timer = replace(clock, tick=lambda: None)
            with precision.settings(setup.precision):
                document["sweeps"].append(sweeps.measure(axis, value, point, settings.columns, setup, timer))
            tell(None)
        stats.reset()
    document["complete"] = True
    keep(document)
    return document


def _clock(settings: Settings, tell: Tell) -> Clock:
    device = torch.device(settings.device)
    # Tests want to be quick, and nobody reads their times.
    clock = Clock.of(device, settings.repeats, settings.warmup, shortest=0.0 if settings.tiny else 2.0)
    return replace(clock, tick=lambda: tell(None))


def _head(settings: Settings) -> Document:
    device = torch.device(settings.device)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "scale": "tiny" if settings.tiny else "full",
        "complete": False,
        "date": machine.now(),
        "command": settings.command,
        "settings": settings.describe(),
        "machine": machine.machine(device),
        "versions": machine.versions(),
        "backend": machine.backend(device),
        "git": machine.git(),
        "workloads": {},
        "sweeps": [],
    }


def _workload(workload: Workload, settings: Settings, setup: Setup, clock: Clock, tell: Tell) -> dict[str, Any]:
    """Everything about one workload, for the JSON file."""
    measured = {"title": workload.title, "note": workload.note(setup), "sizes": workload.sizes(setup)}
    in_each = {}
    for name in settings.precisions:
        with precision.settings(name):
            in_each[name] = _in_precision(workload, settings, replace(setup, precision=name), clock, tell)
    # The first, torch's own default unless others were asked for, is found where files of one precision have it.
    measured |= in_each.pop(settings.precisions[0])
    return {**measured, "precisions": in_each} if in_each else measured


def _in_precision(workload: Workload, settings: Settings, setup: Setup, clock: Clock, tell: Tell) -> dict[str, Any]:
    """What is measured of a workload, in one precision."""
    columns = settings.columns_of(workload)
    stats.reset()
    measured: dict[str, Any] = {"columns": _steps(workload, columns, setup, clock), "products": []}
    if settings.phases:
        timer = replace(clock, tick=lambda: None)
        for product in workload.products(setup):
            measured["products"].append(phases.measure(product, columns, setup, timer))
            tell(None)
    measured["fallbacks"] = [
        {"operation": operation, "backend": name, "reason": without_folders(reason), "calls": calls}
        for (operation, name, reason), calls in kernels.fallbacks.items()
    ]
    measured["lost_hints"] = {name: site.lost for name, site in stats.sites().items() if site.lost}
    # They are in the file now; at exit they would be told as if they were of a training.
    stats.reset()
    if settings.memory:
        for column in columns:
            measured["columns"][column]["memory"] = memory.measure(workload.name, column, setup, settings.threads)
            tell(None)
    return measured


def _steps(workload: Workload, columns: Sequence[str], setup: Setup, clock: Clock) -> dict[str, Any]:
    """Training steps of all columns, interleaved. The models are gone afterwards."""
    trainings = {column: workload.build(column, setup) for column in columns}
    timed = clock.interleave({column: training.step for column, training in trainings.items()})
    return {column: {"step_ms": samples.ms, "loss": _losses(samples)} for column, samples in timed.items()}


def _losses(samples: Samples) -> list[float | None]:
    """The losses of the timed steps; None where one is not finite, which JSON cannot say."""
    losses = [float(cast(torch.Tensor, value)) for value in samples.values]
    return [loss if math.isfinite(loss) else None for loss in losses]
