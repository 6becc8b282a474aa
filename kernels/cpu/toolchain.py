"""What the CPU kernels are compiled for and by what: instruction set, sanitizer, compiler, OpenMP runtime.

Of the environment variables that :mod:`.build` lists, this reads ``SD_PLUGIN_CPU_ISA``, ``SD_PLUGIN_CXX`` and
``SD_PLUGIN_CPU_SANITIZE``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

#: From the least to the most that a machine can do.
ISAS = ("portable", "avx2", "avx512")
SANITIZERS = ("", "address", "undefined", "both")

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
    "both": (
        "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1", "-fno-omit-frame-pointer",
    ),
}  # fmt: skip
NO_COMPILER = "no C++ compiler found; install one, such as g++ (Debian, Ubuntu: apt install g++)"
NOT_CLANG = "clang cannot use the OpenMP runtime of this torch (libgomp); install g++"


class BuildError(RuntimeError):
    """The CPU kernels cannot be built or loaded here; the message says in one line what to do."""


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
        for target in targets(problems):
            return target
        raise BuildError(problems[0] if problems else NO_COMPILER)

    @property
    def flags(self) -> tuple[str, ...]:
        native = ("-mcpu=native",) if self.cpu else ()
        return (*_FLAGS, *_ISA_FLAGS[self.isa], *native, *_SANITIZE_FLAGS[self.sanitize])

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version.lower()


def wanted_isa(environ: Mapping[str, str] = os.environ) -> str:
    """The instruction set asked for, or the best one that both this machine and torch do.

    Raises:
        BuildError: the one asked for does not exist, or this machine does not do it.
    """
    able = machine_isa()
    name = environ.get("SD_PLUGIN_CPU_ISA", "").strip().lower()
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


def machine_isa() -> str:
    flags = set(_cpuinfo("flags"))
    if flags >= {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        return "avx512"
    return "avx2" if flags >= {"avx2", "fma"} else "portable"


def tuned_cpu() -> str:
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


def wanted_sanitizer(environ: Mapping[str, str] = os.environ) -> str:
    """The sanitizer asked for, or an empty string.

    Raises:
        BuildError: it does not exist, or is not part of this process.
    """
    name = environ.get("SD_PLUGIN_CPU_SANITIZE", "").strip().lower()
    if name not in SANITIZERS:
        raise BuildError(f"SD_PLUGIN_CPU_SANITIZE={name} is no sanitizer; valid: {', '.join(SANITIZERS[1:])}")
    # Loaded into a process without it, the address sanitizer ends the process.
    if name in ("address", "both") and not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise BuildError(f"SD_PLUGIN_CPU_SANITIZE={name} needs LD_PRELOAD=$(g++ -print-file-name=libasan.so)")
    return name


def check_compiler(environ: Mapping[str, str]) -> None:
    """Nothing, if ``SD_PLUGIN_CXX`` is unset or a compiler that may work.

    Raises:
        BuildError: it is not.
    """
    problems: list[str] = []
    if environ.get("SD_PLUGIN_CXX", "").strip() and next(targets(problems, environ), None) is None:
        raise BuildError(problems[0])


def targets(problems: list[str], environ: Mapping[str, str] = os.environ) -> Iterator[Target]:
    """The targets to try in order; why a compiler was left out is added to ``problems``.

    Raises:
        BuildError: a variable's value is invalid or impossible here.
    """
    isa, sanitize, cpu = wanted_isa(environ), wanted_sanitizer(environ), tuned_cpu()
    seen = set()
    for compiler in _compilers(environ):
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
        if target.is_clang and not serves_clang(openmp_runtime()):
            problems.append(NOT_CLANG)
            continue
        yield target
        if cpu:
            yield Target(isa, sanitize, compiler, version)


def _compilers(environ: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """The commands of compilers by preference.

    Raises:
        BuildError: ``SD_PLUGIN_CXX`` names none.
    """
    chosen = environ.get("SD_PLUGIN_CXX", "").strip()
    # CXX is often set for other purposes, so it comes first but is not the only one; SD_PLUGIN_CXX is.
    for name in [chosen] if chosen else [environ.get("CXX", ""), "g++", "c++", "clang++"]:
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
        done = run([*compiler, "--version"])
    except OSError:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


# The OpenMP runtime: the one that torch runs on. Threads of a second one would spin against those of the first.


@cache
def openmp_runtime() -> Path | None:
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


def serves_clang(openmp: Path | None) -> bool:
    """Whether code compiled by clang can run on ``openmp``.

    Clang's calls need LLVM's runtime. ``-fopenmp=libgomp`` is no way out, since it makes clang ignore every pragma,
    nor is a second runtime: ``omp_get_thread_num`` would be looked up in torch's, and be wrong in the other's threads.
    """
    return openmp is None or hasattr(ctypes.CDLL(str(openmp)), "__kmpc_fork_call")


def run(command: list[str], cwd: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    # In English, since it is searched, and without what this process preloads for its own sake, such as a sanitizer.
    environ = {**os.environ, **environ, "LC_ALL": "C"}
    environ.pop("LD_PRELOAD", None)
    return subprocess.run(
        command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
