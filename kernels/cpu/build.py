"""Builds the CPU kernels with the system's C++ compiler, once per machine, and loads them.

The library is a C ABI loaded by ``ctypes``: it needs no headers of torch or Python, so one build serves every torch
and Python of a user. It lies in the cache folder under a name that tells apart everything it was made from: sources,
flags, instruction set, compiler, and the OpenMP runtime it is linked to. Only a folder, and a file in it, that nobody
else can write are used.

Environment variables:

- ``SD_PLUGIN_CPU_ISA``: ``avx512``, ``avx2`` or ``portable``, instead of the best that this machine and torch do.
- ``SD_PLUGIN_CXX``: the compiler, with options if it needs any; otherwise ``CXX``, ``g++``, ``c++`` or ``clang++``.
- ``SD_PLUGIN_CACHE``: see :mod:`sd_plugin.kernels.cache_folder`.
- ``SD_PLUGIN_CPU_SANITIZE``: ``address``, ``undefined`` or ``both``, for tests; the first needs to be preloaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import cache_folder, leftovers
from . import toolchain
from .toolchain import BuildError, Target

SOURCES = Path(__file__).parent / "src"
#: What a user is told to expect before the first compilation.
_SECONDS = 5
#: Longer than any compilation: a lock held for longer is a stale one, as network file systems have them.
_LOCK_SECONDS = 180.0
#: How the folders begin that a library is compiled in.
_SCRATCH = ".compiling-"
_FULL = ("No space left on device", "Disk quota exceeded")


def sources(folder: Path = SOURCES) -> list[Path]:
    """Every C++ source and header of the kernels, sorted.

    Raises:
        BuildError: there is none.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h"))
    if not any(path.suffix == ".cpp" for path in found):
        raise BuildError("the sources of the CPU kernels are missing; install sd-plugin again")
    return found


@dataclass(frozen=True)
class Built:
    """A loaded library and where it came from. ``target`` is None when no compiler was there to ask."""

    library: ctypes.CDLL
    path: Path
    isa: str
    sanitize: str
    target: Target | None


def build(folder: Path = SOURCES, exports: Collection[str] = ()) -> Built:
    """Finds the library made from the sources in ``folder`` in the cache, or compiles it; then loads it.

    Args:
        exports: names of functions that it must have.

    Raises:
        BuildError: no compiler, or none that compiles them; no directory to put the library; a library that does
            not load; a variable's value is invalid.
    """
    files = sources(folder)
    problems: list[str] = []
    targets = []
    # All that is in the cache before anything is compiled: the compiler that is tried first may not work here.
    for target in toolchain.targets(problems):
        found = _cached(_name(target, files), exports)
        if found is not None:
            return Built(*found, target.isa, target.sanitize, target)
        targets.append(target)
    if not targets and not os.environ.get("SD_PLUGIN_CXX"):
        # A compute node without a compiler shares the home directory of one that has it.
        isa, sanitize = toolchain.wanted_isa(), toolchain.wanted_sanitizer()
        found = _cached(f"{_stem(isa, sanitize, toolchain.tuned_cpu(), files)}-*.so", exports)
        if found is not None:
            return Built(*found, isa, sanitize, None)
    errors = []
    for target in targets:
        try:
            return _make(target, files, exports)
        except BuildError as error:
            errors.append(error)
    raise errors[0] if errors else BuildError(problems[0] if problems else toolchain.NO_COMPILER)


# Names, which are keys.


def _stem(isa: str, sanitize: str, cpu: str, files: list[Path]) -> str:
    """The part of a library's name that does not depend on the compiler."""
    openmp = toolchain.openmp_runtime()
    parts = [platform.machine(), *Target(isa, sanitize, (), "", cpu).flags, cpu, openmp.name if openmp else ""]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return f"sd_cpu-{isa}-{digest.hexdigest()[:16]}"


def _name(target: Target, files: list[Path]) -> str:
    compiler = [os.path.realpath(target.compiler[0]), *target.compiler[1:], target.version]
    digest = hashlib.sha256("\0".join(compiler).encode())
    return f"{_stem(target.isa, target.sanitize, target.cpu, files)}-{digest.hexdigest()[:8]}.so"


# The cache.


def _cached(pattern: str, exports: Collection[str]) -> tuple[ctypes.CDLL, Path] | None:
    """The first library of that name that can be loaded, and where it is."""
    for place in cache_folder.candidates():
        try:
            with cache_folder.opened(place) as folder:
                for path in sorted(place.glob(pattern)):
                    with suppress(OSError):
                        return _open(folder, path, exports), path
        except OSError as error:
            cache_folder.warn(error)
    return None


def _open(folder: int, path: Path, exports: Collection[str]) -> ctypes.CDLL:
    """Loads the library at ``path`` from the folder with this descriptor.

    Raises:
        OSError: it is not there, is not safe or damaged, lacks a function or does not load.
    """
    try:
        file = cache_folder.open_file(folder, path)
    except cache_folder.UnsafeError as error:
        cache_folder.warn(error)
        raise
    try:
        with open(file, "rb", closefd=False) as stream:
            content = stream.read()
        # A library that was cut short may kill the process that loads it, so its checksum comes first.
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise OSError(f"{path.name} is damaged")
        # The very file that was checked, whatever its path leads to by now. Without /proc there is only the path.
        checked = f"/proc/self/fd/{file}"
        library = ctypes.CDLL(checked if os.path.exists(checked) else str(path))
    except OSError:
        os.close(file)
        raise
    # From now on the loader knows it by that name, so its descriptor stays open: no other library may get the number.
    for name in exports:
        if not hasattr(library, name):
            raise OSError(f"{path.name} lacks {name}")
    return library


def _seal(path: Path) -> None:
    """Adds the checksum that :func:`_open` looks at; loaders do not mind what comes after a library's end.

    Nobody else may write it afterwards, whatever the umask.

    Raises:
        OSError: it cannot be written.
    """
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(folder: int) -> Iterator[None]:
    """Holds the folder's lock, where it can be had in time: without it the same library is compiled twice."""
    file = os.open(".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                # This file system has no locks.
                break
            else:
                break
        yield
    finally:
        os.close(file)


# Compiling.


def _make(target: Target, files: list[Path], exports: Collection[str]) -> Built:
    """Compiles into the first place that takes it, and loads it.

    Raises:
        BuildError: it does not compile, or no place takes it.
    """
    problem = "there is no home and no temporary directory"
    for place in cache_folder.candidates():
        path = place / _name(target, files)
        try:
            with cache_folder.opened(place, make=True) as folder, _locked(folder):
                try:
                    library = _open(folder, path, exports)  # Another process was faster.
                except OSError:
                    leftovers.remove(place, f"{_SCRATCH}*")
                    _compile(target, files, path)
                    library = _open(folder, path, exports)
        except OSError as error:
            cache_folder.warn(error)
            problem = " ".join(str(error).split())
            continue
        return Built(library, path, target.isa, target.sanitize, target)
    raise BuildError(
        f"the CPU kernels cannot be stored or loaded ({problem}); set SD_PLUGIN_CACHE to another directory"
    )


def _compile(target: Target, files: list[Path], path: Path) -> None:
    """Compiles ``files`` to ``path``, which is whole or not there at any time.

    Raises:
        BuildError: the compiler fails. OSError: the directory cannot be written.
    """
    openmp = toolchain.openmp_runtime()
    # The driver adds its own runtime at the end of the line, where it is not needed any more after torch's.
    runtime = () if openmp is None else ("-Wl,--as-needed", str(openmp))
    log = path.with_suffix(".log")
    # Network file systems may keep a file that was just moved for a moment longer.
    prefix = f"{_SCRATCH}{leftovers.tag()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as scratch:
        print(
            f"sd-plugin: compiling the CPU kernels for this machine (once; about {_SECONDS} s)",
            file=sys.stderr,
            flush=True,
        )
        output = Path(scratch, path.name)
        inputs = [str(file.resolve()) for file in files if file.suffix == ".cpp"]
        command = [*target.compiler, *target.flags, *inputs, *runtime, "-o", str(output)]
        # Its intermediate files go, with this directory, even if it is interrupted.
        done = toolchain.run(command, cwd=scratch, TMPDIR=scratch)
        if done.returncode == 0 and output.exists():
            # A relative of clang's that does not say so.
            if b"__kmpc_fork_call" in output.read_bytes() and not toolchain.serves_clang(openmp):
                raise BuildError(toolchain.NOT_CLANG)
            _seal(output)
            os.replace(output, path)
            log.unlink(missing_ok=True)
            return
        text = done.stdout + done.stderr
        for problem in _FULL:
            if problem in text:
                raise OSError(problem)
        saved = Path(scratch, log.name)
        saved.write_text(f"{shlex.join(command)}\n{text}", encoding="utf-8")
        os.replace(saved, log)
    raise BuildError(
        f"{os.path.basename(target.compiler[0])} cannot compile the CPU kernels ({_condensed(text)}); "
        f"install another C++ compiler or set SD_PLUGIN_CXX to one; log: {log}"
    )


def _condensed(text: str) -> str:
    """The lines of a compiler's output that say what is wrong, in one."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return "; ".join(line[-200:] for line in telling[-3:]) or "it says nothing"
