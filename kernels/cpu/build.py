"""Builds the CPU kernels with the system's C++ compiler, once per machine, and loads them.

The library is a C ABI loaded by ``ctypes``: it needs no headers of torch or Python, so one build serves every torch
and Python of a user. It lies in a cache directory under a name that tells apart everything it was made from: sources,
flags, instruction set, compiler, and the OpenMP runtime it is linked to.

Environment variables:

- ``SD_PLUGIN_CPU_ISA``: ``avx512``, ``avx2`` or ``portable``, instead of the best that this machine and torch do.
- ``SD_PLUGIN_CXX``: the compiler, with options if it needs any; otherwise ``CXX``, ``g++``, ``c++`` or ``clang++``.
- ``SD_PLUGIN_CACHE``: the cache directory, otherwise ``$XDG_CACHE_HOME/sd-plugin`` or ``~/.cache/sd-plugin``.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import toolchain
from .toolchain import BuildError, Target

SOURCES = Path(__file__).parent / "src"
#: What a user is told to expect before the first compilation.
_SECONDS = 5
#: Longer than any compilation: a lock held for longer is a stale one, as network file systems have them.
_LOCK_SECONDS = 180.0
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


@cache
def load() -> ctypes.CDLL:
    """The library of the CPU kernels, compiled when the cache does not have it.

    Raises:
        BuildError: it cannot be built or loaded here, or a variable's value is invalid. Not remembered: the next
            call tries again.
    """
    return _built().library


def describe() -> dict[str, str]:
    """The library in words, without absolute paths; builds it when necessary.

    Raises:
        BuildError: as :func:`load`.
    """
    built, openmp = _built(), toolchain.openmp_runtime()
    return {
        "isa": built.isa,
        "compiler": built.target.version if built.target else "unknown (found in the cache)",
        "library": built.path.name,
        "openmp": openmp.name if openmp else "the compiler's",
        "sanitize": built.sanitize,
    }


@cache
def _built() -> Built:
    return build()


def build(folder: Path = SOURCES) -> Built:
    """Finds the library made from the sources in ``folder`` in the cache, or compiles it; then loads it.

    Raises:
        BuildError: no compiler, or none that compiles them; no directory to put the library; a library that does
            not load; a variable's value is invalid.
    """
    files = sources(folder)
    places = _places()
    problems: list[str] = []
    targets = []
    # All that is in the cache before anything is compiled: the compiler that is tried first may not work here.
    for target in toolchain.targets(problems):
        for place in places:
            path = place.path / _name(target, files)
            if place.trusted:
                with suppress(OSError):
                    return Built(_open(path), path, target.isa, target.sanitize, target)
        targets.append(target)
    if not targets and not os.environ.get("SD_PLUGIN_CXX"):
        # A compute node without a compiler shares the home directory of one that has it.
        isa, sanitize = toolchain.wanted_isa(), toolchain.wanted_sanitizer()
        for place in places:
            pattern = f"{_stem(isa, sanitize, toolchain.tuned_cpu(), files)}-*.so"
            for path in sorted(place.path.glob(pattern)) if place.trusted else ():
                with suppress(OSError):
                    return Built(_open(path), path, isa, sanitize, None)
    errors = []
    for target in targets:
        try:
            return _make(target, files, places)
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


@dataclass(frozen=True)
class _Place:
    """A directory for libraries."""

    path: Path
    #: It lies where every user may write, so that somebody else may have made it.
    exposed: bool

    @property
    def trusted(self) -> bool:
        """Whether libraries in it may be loaded: nobody else can have put them there."""
        if not self.exposed:
            return True
        try:
            found = self.path.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077

    def prepare(self) -> None:
        """Makes it.

        Raises:
            OSError: it cannot be made, or is not to be trusted.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.trusted:
            raise PermissionError(f"{self.path} is not a private directory of this user")


def _places() -> list[_Place]:
    """Where libraries are kept, by preference."""
    places = []
    chosen = os.environ.get("SD_PLUGIN_CACHE", "").strip()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is invalid by its specification.
    usual = os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "sd-plugin")
    path = os.path.expanduser(chosen or usual)
    # Without a home directory the tilde stays.
    if not path.startswith("~"):
        places.append(_Place(Path(os.path.abspath(path)), exposed=False))
    # There may be no directory for temporary files either.
    with suppress(OSError):
        places.append(_Place(Path(tempfile.gettempdir(), f"sd-plugin-{os.geteuid()}"), exposed=True))
    return places


def cache_folder() -> Path:
    """Where this user's files are kept, by preference; it need not exist yet.

    Raises:
        OSError: there is no place, not even for temporary files.
    """
    places = _places()
    if not places:
        raise OSError("no cache directory: set SD_PLUGIN_CACHE")
    return places[0].path


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library.

    Raises:
        OSError: it is not there, is damaged or does not load.
    """
    # A library that was cut short may kill the process that loads it, so its checksum comes first.
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path.name} is damaged")
    return ctypes.CDLL(str(path))


def _seal(path: Path) -> None:
    """Adds the checksum that :func:`_open` looks at; loaders do not mind what comes after a library's end.

    Raises:
        OSError: it cannot be written.
    """
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, where it can be had in time: without it the same library is compiled twice."""
    file = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
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


def _make(target: Target, files: list[Path], places: list[_Place]) -> Built:
    """Compiles into the first place that takes it, and loads it.

    Raises:
        BuildError: it does not compile, or no place takes it.
    """
    name = _name(target, files)
    problem = "there is no home and no temporary directory"
    for place in places:
        path = place.path / name
        try:
            place.prepare()
            with _locked(place.path):
                try:
                    library = _open(path)  # Another process was faster.
                except OSError:
                    _compile(target, files, path)
                    library = _open(path)
        except OSError as error:
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
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent, ignore_cleanup_errors=True) as scratch:
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
