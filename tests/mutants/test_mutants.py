"""Taking any one barrier, wait, guard or signal out of a CUDA kernel makes a short run of it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sd_plugin.kernels.cuda import driver, sources

from ..emulation.emulator import CompileError, EmulatedDriver, EmulationError, Mutant, mutants
from ..kernels.conftest import emulated_cuda
from . import probes

SOURCES: dict[str, Callable[[], list[probes.Probe]]] = {
    "cell": probes.step_by_step,
    "decoder": probes.decoders,
    "gemm": probes.products,
    "loss": probes.losses,
    "lstm": probes.persistent,
    "pattern": probes.patterns,
}
#: With and without a look at every access to shared memory; the schedule differs from launch to launch.
TRIES = ((False, 1), (True, 2), (False, 3), (False, 4), (True, 5))
#: So many mutants are one test.
BATCH = 6


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The public functions take the CUDA backend, which takes CPU tensors."""
    with emulated_cuda(monkeypatch):
        monkeypatch.setenv("SD_PLUGIN_BACKEND", "cuda")
        yield


def found(mutant: Mutant, source: str, runs: list[probes.Probe]) -> bool:
    """Some probe notices: a kernel does what no GPU would bear, or its result is wrong.

    Raises:
        CompileError: the mutant does not compile. It could never run, so nothing has been noticed.
    """
    original = sources.read(source)

    def transform(text: str) -> str:
        return mutant.text if text == original else text

    for races, seed in TRIES:
        with driver.use(EmulatedDriver(seed=seed, races=races, transform=transform)):
            for run in runs:
                try:
                    run()
                except CompileError:
                    raise
                except (EmulationError, AssertionError):
                    return True
    return False


def _batches() -> list[tuple[str, int]]:
    return [
        (source, first) for source in SOURCES for first in range(0, len(list(mutants(sources.read(source)))), BATCH)
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("source", "first"), _batches())
def test_every_mutant_is_found(source: str, first: int) -> None:
    runs = SOURCES[source]()
    batch = list(mutants(sources.read(source)))[first : first + BATCH]
    unnoticed = [f"line {m.line}: {m.name}" for m in batch if not found(m, source, runs)]
    assert not unnoticed


def test_only_a_fault_of_a_kernel_counts_as_found() -> None:
    """Not a mutant that does not compile, and not what is wrong with a probe."""
    text = sources.read("loss")
    assert not found(Mutant("nothing", 1, text), "loss", probes.losses()[:1])
    assert found(Mutant("wrong", 1, text.replace("expf(", "-expf(")), "loss", probes.losses()[:1])
    with pytest.raises(CompileError, match="does not compile"):
        found(Mutant("no program", 1, text + "\n#error none"), "loss", probes.losses()[:1])

    def broken() -> None:
        raise RuntimeError("of the probe itself")

    with pytest.raises(RuntimeError, match="of the probe itself"):
        found(Mutant("nothing", 1, text), "loss", [broken])


@pytest.mark.exhaustive
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("races", "seed"), TRIES)
def test_the_sources_as_they_are_pass(source: str, races: bool, seed: int) -> None:
    with driver.use(EmulatedDriver(seed=seed, races=races)):
        for run in SOURCES[source]():
            run()
