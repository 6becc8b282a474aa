"""Runs the CUDA kernels on the CPU, for tests: :class:`EmulatedDriver` compiles and launches as the CUDA driver does.

A source is compiled by the system's C++ compiler with ``cuda_on_cpu.h`` in place of CUDA; that header says what an
emulated launch finds. The kernels get copies of their tensors that end at unmapped memory, so that an access outside
of one is an error here rather than a fault of the process, and the tensors stay as they were.

:func:`mutants` makes copies of a source with one synchronisation or one guard taken out, to see whether tests notice.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from sd_plugin.kernels import cache_folder
from sd_plugin.kernels.cpu import toolchain

if TYPE_CHECKING:
    from sd_plugin.kernels.cuda.driver import Argument, Properties

HERE = Path(__file__).parent
HEADER, RUNTIME = HERE / "cuda_on_cpu.h", HERE / "cuda_on_cpu.cpp"

# Products and sums are contracted as NVRTC does. Kernels read their memory as other types than it was written as. The
# handlers of what the sanitizers find are in the runtime, not in the compiler's libraries.
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast")
_KERNEL_FLAGS = (
    *_COMMON, "-O1", "-g1", "-fno-strict-aliasing", "-fno-math-errno", "-w",
    # Touches every page of a big frame, so that none reaches over the guard page.
    "-fstack-clash-protection",
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero", "-fno-sanitize-recover",
)  # fmt: skip
_RACES_FLAGS = ("-fsanitize=thread",)
_RUNTIME_FLAGS = (*_COMMON, "-O3", "-fno-trapping-math", "-fno-threadsafe-statics")
# No default libraries, among which are the sanitizers'; no lazy binding, since a signal may end a kernel at any time.
_LINK_FLAGS = ("-shared", "-nodefaultlibs", "-Wl,-z,now", "-Wl,-Bsymbolic", "-lm", "-lc", "-lgcc")
#: Threads of a block that a kernel may have without saying how many it has at most.
_MOST_THREADS = 1024
#: Of about 50 KB each.
_MOST_LIBRARIES = 4000


class Unit(Protocol):
    """What is compiled; ``sd_plugin.kernels.cuda.driver.Unit`` is one."""

    @property
    def source(self) -> str: ...
    @property
    def defines(self) -> tuple[tuple[str, int], ...]: ...


class EmulationError(RuntimeError):
    """A source that does not compile, a launch that a GPU would refuse, or a kernel that did something wrong."""


class CompileError(EmulationError):
    """A source that does not compile."""


# ---- compiling ------------------------------------------------------------------------------------------------------

_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*(?=\())?')
_NAME = re.compile(r"\s*(\w+)\s*(?=\()")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise EmulationError(f"a parenthesis is not closed: {text[start : start + 60]!r}")


def declared(source: str) -> str:
    """``source`` with a declaration of each kernel before it, in the same line, that makes it known to the runtime."""
    code = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    parts, end = [], 0
    for found in _KERNEL.finditer(code):
        at, bounds = found.end(), ""
        if code[at : at + 1] == "(":
            at = _closing(code, at)
            bounds = code[found.end() : at]
        name = _NAME.match(code, at)
        if name is None:
            raise EmulationError(f"no name of a kernel: {source[found.start() : at + 60]!r}")
        parameters = code[name.end() : _closing(code, name.end())]
        most = f"SD_FIRST{bounds}" if bounds else _MOST_THREADS
        flat = " ".join(f"{parameters}; SD_EMULATED_KERNEL({name[1]}, {most})".split())
        parts += [source[end : found.start()], f'extern "C" void {name[1]}{flat} ']
        end = found.start()
    return "".join([*parts, source[end:]])


@cache
def _compiler() -> toolchain.Target:
    return toolchain.Target.detect()


def _machine_flags() -> tuple[str, ...]:
    """What makes products with sums one instruction each: otherwise they are calls."""
    return () if toolchain.machine_isa() == "portable" else ("-mavx2", "-mfma")


def _compiled(path: Path, before: Sequence[str], name: str, text: str, after: Sequence[str] = ()) -> Path:
    """``path``, with ``text``, a file called ``name``, compiled into it unless it is there. It is whole at any time.

    Raises:
        CompileError: it does not compile.
    """
    if path.exists():
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        Path(scratch, name).write_text(text, encoding="utf-8")
        output = Path(scratch, path.name)
        command = [*_compiler().compiler, *before, "-x", "c++", name, "-x", "none", *after, "-o", str(output)]
        done = toolchain.run(command, cwd=scratch, TMPDIR=scratch)
        if done.returncode:
            raise CompileError(f"it does not compile:\n{done.stderr[:3000]}")
        os.replace(output, path)
    _forget_old(path.parent)
    return path


def _forget_old(folder: Path) -> None:
    """Deletes half of the libraries in ``folder``, the oldest, when there are very many: mutants are made once."""
    libraries = list(folder.glob("*.so"))
    if len(libraries) <= _MOST_LIBRARIES:
        return
    with suppress(OSError):  # another process does the same
        libraries.sort(key=lambda path: path.stat().st_mtime)
        for path in libraries[: _MOST_LIBRARIES // 2]:
            path.unlink(missing_ok=True)


def _digest(*parts: object) -> str:
    texts = [_compiler().version, *_compiler().compiler, *_machine_flags(), *map(str, parts)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def _runtime(folder: Path) -> Path:
    """The object file that is part of every library."""
    flags = (*_RUNTIME_FLAGS, *_machine_flags(), f"-I{HERE}")
    text = RUNTIME.read_text(encoding="utf-8")
    path = folder / f"runtime-{_digest(text, HEADER.read_text(encoding='utf-8'), _RUNTIME_FLAGS)}.o"
    return _compiled(path, (*flags, "-c"), RUNTIME.name, text)


def compile_kernels(source: str, name: str, defines: Sequence[tuple[str, int]], races: bool, folder: Path) -> Path:
    """The library made of ``source``, from ``folder`` if it is there.

    Args:
        name: that messages give the source.
        races: with a call at each access to memory, which lets the runtime find races.

    Raises:
        CompileError: it does not compile.
        BuildError: there is no compiler.
    """
    text = declared(source)
    runtime = _runtime(folder)
    flags = [*_KERNEL_FLAGS, *(_RACES_FLAGS if races else ()), *(f"-D{key}={value}" for key, value in defines)]
    path = folder / f"{name}-{_digest(text, runtime.name, flags, _LINK_FLAGS)}.so"
    before = (*flags, *_machine_flags(), "-include", str(HEADER))
    return _compiled(path, before, f"{name}.cu", text, (str(runtime), *_LINK_FLAGS))


# ---- what the runtime takes (cuda_on_cpu.cpp and cuda_on_cpu.h have the same structures) ----------------------------


class _Parameter(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char),
        ("constant", ctypes.c_ubyte),
        ("element", ctypes.c_char),
        ("size", ctypes.c_ubyte),
    )


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("count", ctypes.c_int),
        ("most_threads", ctypes.c_int),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("original", ctypes.c_void_p),
        ("size", ctypes.c_ulonglong),
        ("writable", ctypes.c_int),
        ("argument", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("mapping", ctypes.c_void_p),
        ("mapped", ctypes.c_ulonglong),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("buffer", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_ulonglong))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.POINTER(_Kernel)),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("arguments", ctypes.POINTER(_Argument)),
        ("buffer_count", ctypes.c_int),
        ("grid", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("cooperative", ctypes.c_int),
        ("races", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
        ("seconds", ctypes.c_double),
        ("arena", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("error_size", ctypes.c_ulonglong),
    )


# More than the runtime needs; stacks of fibers are kept there from one launch to the next.
_ARENA = ctypes.create_string_buffer(256)
_ONE_AT_A_TIME = threading.Lock()

_ELEMENTS = {
    ("f", 4): (torch.float32,),
    ("f", 8): (torch.float64,),
    ("h", 2): (torch.float16, torch.bfloat16, torch.int16),
    ("i", 1): (torch.uint8, torch.int8, torch.bool),
    ("i", 4): (torch.int32,),
    ("i", 8): (torch.int64,),
}


class _Arguments:
    """The arguments of a launch as the runtime takes them.

    Raises:
        EmulationError: they are not those that ``kernel`` takes.
    """

    def __init__(self, kernel: _Kernel, given: Sequence[Argument]) -> None:
        if len(given) != kernel.count:
            raise EmulationError(f"it takes {kernel.count} arguments, not {len(given)}")
        self.values = (_Argument * max(len(given), 1))()
        self._buffers: list[_Buffer] = []
        self._by_address: dict[int, int] = {}
        for index, argument in enumerate(given):
            try:
                self._set(index, self.values[index], kernel.parameters[index], argument)
            except ValueError as error:
                raise EmulationError(f"argument {index}: {error}") from None
        self.buffers = (_Buffer * max(len(self._buffers), 1))(*self._buffers)
        self.buffer_count = len(self._buffers)

    def _set(self, index: int, value: _Argument, parameter: _Parameter, argument: Argument) -> None:
        kind = parameter.kind.decode()
        value.buffer = -1
        if kind == "p":
            if isinstance(argument, Tensor):
                self._point(index, value, parameter, argument)
            elif argument is not None:
                raise ValueError(f"{type(argument).__name__}, where it takes a pointer")
        elif kind == "i":
            if not isinstance(argument, int):
                raise ValueError(f"{type(argument).__name__}, where it takes an int")
            # Of a `long long` the CUDA driver sets the lower half only.
            least = -(2**31) if parameter.size == 4 else 0
            if not least <= argument < 2**31:
                raise ValueError(f"{argument} is no int")
            value.value = argument & 0xFFFFFFFF
        elif kind == "f" and parameter.size == 4:
            if not isinstance(argument, float):
                raise ValueError(f"{type(argument).__name__}, where it takes a float")
            value.value = int.from_bytes(bytes(ctypes.c_float(argument)), "little")
        else:
            raise ValueError("a parameter of a type that no driver can pass")

    def _point(self, index: int, value: _Argument, parameter: _Parameter, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"a tensor on {tensor.device}")
        element = parameter.element.decode()
        dtypes = _ELEMENTS.get((element, parameter.size))
        if dtypes is not None and tensor.dtype not in dtypes:
            raise ValueError(f"a tensor of {tensor.dtype}, where it takes {dtypes[0]}")
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start == 0:
            return  # an empty tensor
        if start not in self._by_address:
            self._by_address[start] = len(self._buffers)
            self._buffers.append(_Buffer(original=start, size=storage.nbytes(), argument=index))
        value.buffer = self._by_address[start]
        value.value = tensor.data_ptr() - start
        if not parameter.constant:
            self._buffers[value.buffer].writable = 1


# ---- launching ------------------------------------------------------------------------------------------------------


def _default_read(name: str) -> str:
    from sd_plugin.kernels.cuda import sources

    return sources.read(name)


class _Library(NamedTuple):
    """A compiled source."""

    library: ctypes.CDLL
    path: Path
    text: str  #: that was compiled

    def kernel(self, name: str) -> _Kernel:
        """
        Raises:
            EmulationError: it has none of this name.
        """
        try:
            return _Kernel.in_dll(self.library, f"sd_emulated_{name}")
        except ValueError:
            raise EmulationError(f"{self.path.name.rpartition('-')[0]} has no kernel {name}") from None


@dataclass
class EmulatedDriver:
    """Fulfils ``sd_plugin.kernels.cuda.driver.Driver`` with tensors on the CPU.

    Every launch has a schedule of its own, drawn from ``seed`` and the number of launches so far.
    """

    #: 0: the first thread that can go on always does, and blocks come one after the other.
    seed: int = 1
    multiprocessors: int = 132
    shared_memory: int = 232448
    capability: tuple[int, int] = (9, 0)
    #: Search for races in shared memory: two threads use a byte, one of them writes, and no barrier is between. About
    #: five times slower.
    races: bool = False
    #: Processor time of a launch, after which it is an error.
    seconds: float = 30.0
    #: Of sources by name, as ``sources.read``.
    read: Callable[[str], str] = _default_read
    #: Applied to each source before it is compiled.
    transform: Callable[[str], str] | None = None
    #: Folder for what is compiled, by default one in the user's cache.
    cache: Path | None = None
    #: So far.
    launches: int = field(default=0, init=False)

    device_type = "cpu"

    def __post_init__(self) -> None:
        self._libraries: dict[tuple[str, tuple[tuple[str, int], ...], bool, str], _Library] = {}

    def reason_unavailable(self) -> str | None:
        """Why it cannot launch anything on this machine; None when it can."""
        try:
            _compiler()
        except toolchain.BuildError as error:
            return str(error)
        return None

    def properties(self, device: torch.device) -> Properties:
        """What the emulated device allows."""
        from sd_plugin.kernels.cuda.driver import Properties

        return Properties("emulated", self.multiprocessors, self.shared_memory, self.capability)

    def library(self, unit: Unit) -> _Library:
        """``unit``, compiled.

        Raises:
            CompileError: it does not compile.
        """
        text = self.read(unit.source)
        if self.transform is not None:
            text = self.transform(text)
        key = (unit.source, unit.defines, self.races, text)
        if key not in self._libraries:
            folder = self.cache or cache_folder.made("emulated")
            path = compile_kernels(text, unit.source, unit.defines, self.races, folder)
            self._libraries[key] = _Library(ctypes.CDLL(str(path)), path, text)
        return self._libraries[key]

    def launch(
        self,
        unit: Unit,
        function: str,
        device: torch.device,
        grid: int,
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
        cooperative: bool,
    ) -> None:
        """Run ``function`` of ``unit`` with ``grid`` blocks, all at once if ``cooperative``.

        Raises:
            EmulationError: the launch is impossible, or the kernel did something wrong.
        """
        library = self.library(unit)
        kernel = library.kernel(function)
        if device.type != "cpu":
            raise EmulationError(f"kernel {function}: launched on {device}")
        limits = {"threads": (threads, 1, kernel.most_threads), "shared memory": (shared, 0, self.shared_memory)}
        # Blocks of a persistent kernel are that big that no two share a multiprocessor.
        limits["blocks"] = (grid, 1, self.multiprocessors if cooperative else 2**31 - 1)
        for what, (number, least, most) in limits.items():
            if not least <= number <= most:
                raise EmulationError(f"kernel {function}: launched with {what} {number}, not {least} to {most}")
        try:
            packed = _Arguments(kernel, arguments)
        except EmulationError as error:
            raise EmulationError(f"kernel {function}: {error}") from None
        message = ctypes.create_string_buffer(4096)
        launch = _Launch(
            name=function.encode(),
            kernel=ctypes.pointer(kernel),
            buffers=packed.buffers,
            arguments=packed.values,
            buffer_count=packed.buffer_count,
            grid=grid,
            threads=threads,
            shared=shared,
            cooperative=cooperative,
            races=self.races,
            seed=(self.seed * 1_000_003 + self.launches) % 2**64 if self.seed else 0,
            seconds=self.seconds,
            arena=ctypes.addressof(_ARENA),
            error=ctypes.cast(message, ctypes.c_char_p),
            error_size=len(message),
        )
        self.launches += 1
        with _ONE_AT_A_TIME:
            failed = library.library.sd_emulate(ctypes.byref(launch))
        if failed:
            raise EmulationError(_explained(message.value.decode(), library))


def _explained(message: str, library: _Library) -> str:
    """``message`` with the source's text at the lines that it names."""
    lines = library.text.splitlines()

    def quote(line: int) -> str:
        return f"line {line} `{lines[line - 1].strip()}`" if 0 < line <= len(lines) else f"line {line}"

    def place(found: re.Match[str]) -> str:
        program = shutil.which("addr2line")
        if program is None:
            return ""
        command = [program, "--inlines", f"--exe={library.path}", found[1]]
        places = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        for text in places:
            # Not in the header, but where it is called.
            file, _, line = text.rpartition(":")
            if file.endswith(".cu") and line.isdigit():
                return f", {quote(int(line))}"
        return ""

    message = re.sub(r"\bline (\d+)", lambda found: quote(int(found[1])), message)
    return re.sub(r" \[pc (0x[0-9a-f]+)\]", place, message)


# ---- mutants --------------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """A source with one fault."""

    name: str  #: what is done to it
    line: int  #: where, from 1
    text: str


_STATEMENTS = ("__syncthreads", "__syncwarp", "cp_async_wait", "cp_async_commit", "announce", "await")
_CALL = re.compile(rf"\b({'|'.join(_STATEMENTS)}|GUARD)(?:<([^<>]*)>)?(?=\()")
_DECLARED = re.compile(r"\b(?!else\b|do\b)\w+\s*\Z")  # a type comes before it
_NO_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*#[ \t]*define\s+GUARD\b[^\n]*", re.DOTALL | re.MULTILINE)


def mutants(source: str) -> Iterator[Mutant]:
    """Copies of ``source`` that each lack one thing that keeps threads in order or an index in range.

    - A statement that is a call of ``__syncthreads``, ``__syncwarp``, ``cp_async_wait``, ``cp_async_commit``,
      ``announce`` or ``await``: removed.
    - ``cp_async_wait<N>()``: also with one group more that may be under way.
    - A condition written ``GUARD(condition)``, where the source has ``#define GUARD(condition) (condition)``: always
      true, and always false.
    """
    code = _NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    for found in _CALL.finditer(code):
        name, count = found[1], found[2]
        start, end = found.start(), _closing(code, found.end())
        line = source.count("\n", 0, start) + 1

        def replaced(by: str, start: int = start, end: int = end) -> str:
            # Line numbers stay as they are.
            return source[:start] + by + "\n" * source.count("\n", start, end) + source[end:]

        if name == "GUARD":
            for value in ("true", "false"):
                yield Mutant(f"guard is {value}", line, replaced(value))
        elif code[end:].lstrip().startswith(";") and not _DECLARED.search(code, 0, start):
            yield Mutant(f"{name} removed", line, replaced("(void)0"))
            if count:
                yield Mutant(f"{name} weakened", line, replaced(f"{name}<({count}) + 1>()"))
