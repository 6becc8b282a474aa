"""What the machine has, and what may be asked of it: a device, threads, memory for a model."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from thread_limits import processors
from user_input import shown

from sd_plugin.errors import UsageError

_CGROUPS = Path("/sys/fs/cgroup")


def check_threads(threads: int) -> None:
    """Raise UsageError for more threads than processors: with very many OpenMP ends the process."""
    if threads > processors():
        raise UsageError(f"--threads {shown(threads)}: this machine has {processors()} processors")


def check_device(name: str) -> None:
    """Raise UsageError unless ``name`` is one of a device that is computed on; whether it is there, torch knows."""
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {shown(name)[1:-1]}: must be cpu, cuda or cuda:N")


def memory() -> int:
    """Bytes that this process can have at most: RAM and swap space, or less by a limit of its own or of its cgroup."""
    found = [*_physical(), *_cgroup_limits()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        found.append(address_space)
    return min(found)


def _physical() -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        yield 1024 * sum(int(words[1]) for words in lines if words[0] in ("MemTotal:", "SwapTotal:"))
        return
    yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits() -> Iterator[int]:
    """The limits of the cgroups that this process is in, versions 2 and 1; ``max`` is none."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
            group = top / path.lstrip("/")
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
                with suppress(OSError, ValueError):
                    yield int((folder / name).read_text())


def check_fits(what: str, needed: int, available: int, where: str = "this machine") -> None:
    """Refuse what cannot be held.

    Args:
        what: is to be held, in words; needed: its bytes, or a lower bound of them.
        available: bytes; where: of what, in words.

    Raises:
        UsageError: it needs more; both figures are told.
    """
    if needed > available:
        raise UsageError(f"{what} needs {needed / 2**30:.3g} GiB, and {where} has {available / 2**30:.3g} GiB")
