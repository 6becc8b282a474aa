#!/usr/bin/env python
"""What the CUDA kernels need of a multiprocessor: registers, spills and shared memory, by NVRTC; no GPU is needed.

python benchmarks/cuda_resources.py [--json benchmarks/results/cuda_resources.json]
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from sd_plugin.kernels.cuda import sources
from sd_plugin.kernels.cuda.driver import Unit

#: Compute capabilities that every kernel is compiled for.
ARCHITECTURES = (80, 90)
_DISTRIBUTIONS = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc")
_USED = re.compile(
    r"Function properties for (\w+)\n[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


class CompileError(RuntimeError):
    """NVRTC is missing, or does not take a source."""


class Resources(NamedTuple):
    """Of one kernel."""

    registers: int
    stack: int  #: bytes of local memory
    spills: int  #: bytes stored and loaded


@cache
def nvrtc() -> ctypes.CDLL:
    """The library of an installed NVRTC wheel.

    Raises:
        CompileError: none is installed.
    """
    for name in _DISTRIBUTIONS:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.fullmatch(r"libnvrtc\.so\.\d+", file.name):
                return ctypes.CDLL(str(file.locate()))
    raise CompileError(f"NVRTC is not installed: pip install {_DISTRIBUTIONS[0]}")


def compile_unit(unit: Unit, architecture: int) -> tuple[dict[str, Resources], int]:
    """Compile ``unit`` for ``architecture``, such as 90.

    Returns:
        What each of its kernels needs, and the size of the result.

    Raises:
        CompileError: NVRTC is missing or does not take it; its log.
    """
    library, program = nvrtc(), ctypes.c_void_p()
    source = sources.read(unit.source).encode()
    options = [option.encode() for option in (*unit.options(), f"-arch=sm_{architecture}", "--ptxas-options=-v")]
    library.nvrtcCreateProgram(ctypes.byref(program), source, f"{unit.source}.cu".encode(), 0, None, None)
    try:
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        text = log.value.decode(errors="replace")
        if status:
            raise CompileError(f"{unit}: {text}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    found = {
        name: Resources(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in _USED.findall(text)
    }
    return found, size.value
