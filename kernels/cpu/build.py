"""Builds the CPU kernels with the system's C++ compiler, once per machine, and loads them.

The library is a C ABI loaded by ``ctypes``: it needs no headers of torch or Python, so one build serves every torch
and Python of a user. It lies in a cache directory under a name that tells apart everything it was made from: sources,
flags, instruction set, compiler, and the OpenMP runtime it is linked to.

Environment variables:

- ``SD_PLUGIN_CPU_ISA``: ``avx512``, ``avx2`` or ``portable``, instead of the best that this machine and torch do.
- ``SD_PLUGIN_CXX``: the compiler, with options if it needs any; otherwise ``CXX``, ``g++``, ``c++`` or ``clang++``.
- ``SD_PLUGIN_CACHE``: the cache directory, otherwise ``$XDG_CACHE_HOME/sd-plugin`` or ``~/.cache/sd-plugin``.
- ``SD_PLUGIN_CPU_SANITIZE``: ``address`` or ``undefined``, for tests; ``address`` needs the sanitizer preloaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"
#: From the least to the most that a machine can do.
ISAS = ("portable", "avx2", "avx512")
SANITIZERS = ("", "address", "undefined")

# No -ffast-math: infinities and nan have to come through. No -march=native: a cache in a home directory may be shared
# by different machines, which the name of a library tells apart by instruction set only. Hidden, since two builds for
# different instruction sets would share the static variables of templates within one process.
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_ISA_FLAGS = {
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512",
        "-DSD_ISA=512",
    ),
    "avx2": ("-mavx2", "-mfma", "-DSD_ISA=256"),
    "portable": ("-DSD_ISA=128",),
}  # fmt: skip
_SANITIZE_FLAGS = {
    "": (),
    "address": ("-fsanitize=address", "-O1", "-g", "-fno-omit-frame-pointer"),
    "undefined": ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"),
}
#: What a user is told to expect before the first compilation.
_SECONDS = 5
#: Longer than any compilation: a lock held for longer is a stale one, as network file systems have them.
_LOCK_SECONDS = 180.0
_NO_COMPILER = "no C++ compiler found; install one, such as g++ (Debian, Ubuntu: apt install g++)"
_NOT_CLANG = "clang cannot use the OpenMP runtime of this torch (libgomp); install g++"
_FULL = ("No space left on device", "Disk quota exceeded")


class BuildError(RuntimeError):
    """The CPU kernels cannot be built or loaded here; the message says in one line what to do."""


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
class Target:
    """What is compiled for, and by what."""

    isa: str
    sanitize: str
    #: The program's absolute path, and options given with it.
    compiler: tuple[str, ...]
    #: The first line of what it says about its version.
    version: str
    #: Which CPU ``-mcpu=native`` means, where that option is used.
    cpu: str = ""

    @classmethod
    def detect(cls) -> Target:
        """The target for this machine and environment, with the compiler that is tried first.

        Raises:
            BuildError: a variable's value is invalid or impossible here, or there is no usable compiler.
        """
        problems: list[str] = []
        for target in _targets(problems):
            return target
        raise BuildError(problems[0] if problems else _NO_COMPILER)

    @property
    def flags(self) -> tuple[str, ...]:
        native = ("-mcpu=native",) if self.cpu else ()
        return (*_FLAGS, *_ISA_FLAGS[self.isa], *native, *_SANITIZE_FLAGS[self.sanitize])

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version.lower()


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
    built, openmp = _built(), _openmp()
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
    for target in _targets(problems):
        for place in places:
            path = place.path / _name(target, files)
            if place.trusted:
                with suppress(OSError):
                    return Built(_open(path), path, target.isa, target.sanitize, target)
        targets.append(target)
    if not targets and not os.environ.get("SD_PLUGIN_CXX"):
        # A compute node without a compiler shares the home directory of one that has it.
        isa, sanitize = _isa(), _sanitizer()
        for place in places:
            pattern = f"{_stem(isa, sanitize, _cpu(), files)}-*.so"
            for path in sorted(place.path.glob(pattern)) if place.trusted else ():
                with suppress(OSError):
                    return Built(_open(path), path, isa, sanitize, None)
    errors = []
    for target in targets:
        try:
            return _make(target, files, places)
        except BuildError as error:
            errors.append(error)
    raise errors[0] if errors else BuildError(problems[0] if problems else _NO_COMPILER)


# What to build for.


def _isa() -> str:
    """The instruction set asked for, or the best one that both this machine and torch do.

    Raises:
        BuildError: the one asked for does not exist, or this machine does not do it.
    """
    able = _machine_isa()
    name = os.environ.get("SD_PLUGIN_CPU_ISA", "").strip().lower()
    if not name:
        # A user who lowers torch's, with ATEN_CPU_CAPABILITY, means ours too.
        capability = torch.backends.cpu.get_cpu_capability()
        allowed = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "portable")
        return min(able, allowed, key=ISAS.index)
    if name not in ISAS:
        raise BuildError(f"SD_PLUGIN_CPU_ISA={name} is no instruction set; valid: {', '.join(reversed(ISAS))}")
    if ISAS.index(name) > ISAS.index(able):
        raise BuildError(f"SD_PLUGIN_CPU_ISA={name} cannot run on this machine; its best is {able}")
    return name


def _machine_isa() -> str:
    flags = set(_cpuinfo("flags"))
    if flags >= {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        return "avx512"
    return "avx2" if flags >= {"avx2", "fma"} else "portable"


def _cpu() -> str:
    """On ARM, where there is no instruction set to choose, the CPU that the compiler will tune for; else nothing."""
    if platform.machine() != "aarch64":
        return ""
    return " ".join(sorted({*_cpuinfo("CPU implementer"), *_cpuinfo("CPU part"), *_cpuinfo("Features")})) or "unknown"


def _cpuinfo(key: str) -> list[str]:
    """All words of all lines called ``key`` that the system has about its CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [word for name, _, words in pairs if name.strip() == key for word in words.split()]


def _sanitizer() -> str:
    """The sanitizer asked for, or an empty string.

    Raises:
        BuildError: it does not exist, or is not part of this process.
    """
    name = os.environ.get("SD_PLUGIN_CPU_SANITIZE", "").strip().lower()
    if name not in SANITIZERS:
        raise BuildError(f"SD_PLUGIN_CPU_SANITIZE={name} is no sanitizer; valid: {', '.join(SANITIZERS[1:])}")
    # Loaded into a process without it, the address sanitizer ends the process.
    if name == "address" and not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise BuildError("SD_PLUGIN_CPU_SANITIZE=address needs LD_PRELOAD=$(g++ -print-file-name=libasan.so)")
    return name


def _targets(problems: list[str]) -> Iterator[Target]:
    """The targets to try in order; why a compiler was left out is added to ``problems``.

    Raises:
        BuildError: a variable's value is invalid or impossible here.
    """
    isa, sanitize, cpu = _isa(), _sanitizer(), _cpu()
    seen = set()
    for compiler in _compilers():
        version = _version(compiler)
        if version is None:
            problems.append(f"{compiler[0]} does not run; install a C++ compiler such as g++")
            continue
        # c++ is mostly g++ by another name, which is how its version begins.
        identity = (version.partition(" ")[2], compiler[1:])
        if identity in seen:
            continue
        seen.add(identity)
        target = Target(isa, sanitize, compiler, version, cpu)
        if target.is_clang and not _serves_clang(_openmp()):
            problems.append(_NOT_CLANG)
            continue
        yield target
        if cpu:
            yield Target(isa, sanitize, compiler, version)


def _compilers() -> Iterator[tuple[str, ...]]:
    """The commands of compilers by preference.

    Raises:
        BuildError: ``SD_PLUGIN_CXX`` names none.
    """
    chosen = os.environ.get("SD_PLUGIN_CXX", "").strip()
    # CXX is often set for other purposes, so it comes first but is not the only one; SD_PLUGIN_CXX is.
    for name in [chosen] if chosen else [os.environ.get("CXX", ""), "g++", "c++", "clang++"]:
        try:
            words = shlex.split(name)
        except ValueError:
            words = []
        program = shutil.which(words[0]) if words else None
        if program:
            yield (os.path.abspath(program), *words[1:])
        elif chosen:
            raise BuildError(f"SD_PLUGIN_CXX={chosen}: no such program; name a C++ compiler such as g++")


def _version(compiler: tuple[str, ...]) -> str | None:
    """The first line of the compiler's version, None when it does not run."""
    try:
        done = _run([*compiler, "--version"])
    except OSError:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


# The OpenMP runtime: the one that torch runs on. Threads of a second one would spin against those of the first.


@cache
def _openmp() -> Path | None:
    """The file of the OpenMP runtime that torch is linked to; None when it has none or it cannot be told.

    Wheels of torch ship their own, under a name of its own in some versions; the compiler would take the system's.
    """
    try:
        symbol = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).omp_get_max_threads
        address = ctypes.cast(symbol, ctypes.c_void_p).value or 0
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, AttributeError):
        return None
    for line in lines:
        span, *_, name = line.split(maxsplit=5)
        low, _, high = span.partition("-")
        if int(low, 16) <= address < int(high, 16):
            return Path(name) if os.path.exists(name) else None
    return None


def _serves_clang(openmp: Path | None) -> bool:
    """Whether code compiled by clang can run on ``openmp``.

    Clang's calls need LLVM's runtime. ``-fopenmp=libgomp`` is no way out, since it makes clang ignore every pragma,
    nor is a second runtime: ``omp_get_thread_num`` would be looked up in torch's, and be wrong in the other's threads.
    """
    return openmp is None or hasattr(ctypes.CDLL(str(openmp)), "__kmpc_fork_call")


# Names, which are keys.


def _stem(isa: str, sanitize: str, cpu: str, files: list[Path]) -> str:
    """The part of a library's name that does not depend on the compiler."""
    openmp = _openmp()
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
    openmp = _openmp()
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
        done = _run(command, cwd=scratch, TMPDIR=scratch)
        if done.returncode == 0 and output.exists():
            # A relative of clang's that does not say so.
            if b"__kmpc_fork_call" in output.read_bytes() and not _serves_clang(openmp):
                raise BuildError(_NOT_CLANG)
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


def _run(command: list[str], cwd: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    # In English, since it is searched, and without what this process preloads for its own sake, such as a sanitizer.
    environ = {**os.environ, **environ, "LC_ALL": "C"}
    environ.pop("LD_PRELOAD", None)
    return subprocess.run(
        command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
