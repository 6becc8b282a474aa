"""The device that ``gpu_check.py`` checks: its precisions, its clock, and the backend that is forced on the kernels."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sd_plugin.bench import precision as bench_precision
from sd_plugin.kernels.cuda.choices import PRODUCTS, RECURRENCE
from sd_plugin.kernels.dispatch import VARIABLE

__all__ = ["PRECISIONS", "PRODUCTS", "RECURRENCE", "SHAPES", "Machine", "Precision", "Shape", "captured", "environment"]

#: Milliseconds that a timed sample lasts at least.
SHORTEST_MS = 0.5


class Precision(NamedTuple):
    """Operands of a product: what they are stored in, and whether float32 is rounded to TF32."""

    name: str
    of_backend: str  #: as the CUDA backend calls it
    dtype: torch.dtype
    tf32: bool

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Torch's switches; the CUDA backend follows them."""
        return bench_precision.tf32(cudnn=self.tf32, matmul=self.tf32)


PRECISIONS = (
    Precision("fp32", "STRICT", torch.float32, False),
    Precision("tf32", "TF32", torch.float32, True),
    Precision("fp16", "F16", torch.float16, False),
    Precision("bf16", "BF16", torch.bfloat16, False),
)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables inside; afterwards as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Machine:
    """What is checked.

    Attributes:
        device: of all tensors; backend: of our kernels.
        tiny: small shapes and few repeats, to test the program; never for results.
    """

    device: torch.device
    backend: str
    tiny: bool = False

    @classmethod
    def gpu(cls) -> "Machine":
        """The current CUDA device and the backend made for it."""
        return cls(torch.device("cuda", torch.cuda.current_device()), "cuda")

    @classmethod
    def rehearsal(cls) -> "Machine":
        """A stand-in for machines without a GPU."""
        return cls(torch.device("cpu"), "reference", tiny=True)

    @property
    def is_gpu(self) -> bool:
        """It is the real thing."""
        return self.device.type == "cuda"

    @property
    def multiprocessors(self) -> int:
        """Blocks that run side by side for sure."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count if self.is_gpu else 2

    def ours(self, **environ: str) -> contextlib.AbstractContextManager[None]:
        """Our kernels run on the checked backend: one that cannot is an error, not a slower one."""
        return environment(**{VARIABLE: self.backend, **environ})

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """Our kernels are their own definition; for float64 operands."""
        return environment(**{VARIABLE: "reference"})

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def is_broken(self) -> bool:
        """Nothing more can be done in this process: a kernel has broken the context."""
        try:
            self.synchronize()
        except Exception:  # whatever it says, each call would say it
            return True
        return False

    def event_us(self, run: Callable[[], object], inner: int) -> float:
        """Microseconds of one of ``inner`` runs, from the first one's start to the last one's end on the device."""
        if not self.is_gpu:
            start = time.perf_counter()
            for _ in range(inner):
                run()
            return 1e6 * (time.perf_counter() - start) / inner
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / inner

    def us(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Median microseconds of ``run``, as a program finds it that calls it again and again."""
        for _ in range(1 if self.tiny else 3):
            run()
        self.synchronize()
        inner = 1 if self.tiny else max(1, min(200, round(1e3 * SHORTEST_MS / max(1.0, self.event_us(run, 1)))))
        return statistics.median(self.event_us(run, inner) for _ in range(2 if self.tiny else repeats))

    def device_us(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Median microseconds of ``run`` on the device alone: replayed as a CUDA graph, so Python costs nothing."""
        if not self.is_gpu:
            return self.us(run, repeats)
        calls = 10

        def several() -> None:
            for _ in range(calls):
                run()

        graph = captured(several)
        return self.us(graph.replay, repeats) / calls

    def host_us(self, run: Callable[[], object], calls: int = 100) -> float:
        """Microseconds that a call of ``run`` keeps the host busy, its work on the device being short."""
        for _ in range(3):
            run()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(2 if self.tiny else calls):
            run()
        took = time.perf_counter() - start
        self.synchronize()
        return 1e6 * took / (2 if self.tiny else calls)


def captured(run: Callable[[], object]) -> Any:
    """``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what happens at first use only must not be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Shape(NamedTuple):
    """A stack of LSTM layers of a workload: input and hidden size of each, batch, time steps, dropout."""

    layers: tuple[tuple[int, int], ...]
    batch: int
    steps: int
    p: float

    def short(self, steps: int) -> "Shape":
        """Of fewer steps, where rounding is checked and not time."""
        return self._replace(steps=min(steps, self.steps))


SHAPES: Mapping[str, Shape] = {
    "zaremba-medium": Shape(((650, 650),) * 2, 20, 35, 0.5),
    "zaremba-large": Shape(((1500, 1500),) * 2, 20, 35, 0.65),
    "awd-lstm": Shape(((400, 1150), (1150, 1150), (1150, 400)), 20, 70, 0.5),
    "opennmt": Shape(((512, 512),) * 2, 64, 25, 0.3),
    "ner": Shape(((130, 100),), 10, 20, 0.5),
}
TINY_SHAPES: Mapping[str, Shape] = {"tiny": Shape(((6, 8), (8, 5)), 3, 4, 0.5)}


def shapes(machine: Machine) -> Mapping[str, Shape]:
    """Those of the paper, or small ones."""
    return TINY_SHAPES if machine.tiny else SHAPES
