"""The CPU kernels under the address and the undefined-behaviour sanitizer: their own tests, run in another process.

The address sanitizer replaces malloc, so it sees a kernel step over the edge of a tensor. It does not see what
instructions with a mask read or write. Compiling takes longest, so one library has both, and is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sd_plugin.kernels import cache_folder
from sd_plugin.kernels.cpu import toolchain
from sd_plugin.kernels.cpu.toolchain import BuildError, Target

from ..patience import PATIENCE
from . import cases

pytestmark = pytest.mark.exhaustive

HERE = Path(__file__).parent
KERNEL_TESTS = tuple(
    HERE / f"test_{name}.py" for name in ("gemm", "lstm_kernels", "decoder_kernels", "loss_kernels", "large_shapes")
)
#: Those that have to be there, of each choice of sanitizers.
RUNTIMES = {"address": ("libasan.so",), "undefined": ("libubsan.so",), "both": ("libasan.so", "libubsan.so")}
#: Of the examples that these tests take otherwise. What an example may be is the same; large_shapes takes all of them.
SHARE = 0.3


def runtime(name: str) -> str:
    """The file of one of the compiler's runtime libraries; skips the test when there is none."""
    try:
        target = Target.detect()
    except BuildError as error:
        pytest.skip(str(error))
    asked = [*target.compiler, f"-print-file-name={name}"]
    path = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    # A compiler repeats the bare name of what it does not have.
    if not path.is_absolute() or path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip(f"{target.version} comes without {name}")
    return str(path)


def pytest_under(sanitizer: str, cache: Path, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in a process where the CPU kernels are built with ``sanitizer``."""
    environ = {
        **os.environ,
        "SD_PLUGIN_CPU_SANITIZE": sanitizer,
        "SD_PLUGIN_CACHE": str(cache),
        # Python leaks by design. A report ends the process, with its status, instead of being one line among many.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        **environ,
    }
    environ.pop("SD_PLUGIN_BACKEND", None)
    preloaded = [runtime(name) for name in RUNTIMES[sanitizer]]
    if sanitizer != "undefined":
        # The C++ runtime too: AddressSanitizer looks for what throws exceptions once, as it starts.
        environ["LD_PRELOAD"] = ":".join([preloaded[0], runtime("libstdc++.so.6")])
    # Not captured: what a sanitizer says as it ends the process would be lost.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=no", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("isa", toolchain.ISAS)
def test_kernels_are_clean(isa: str) -> None:
    best = toolchain.machine_isa()
    if toolchain.ISAS.index(isa) > toolchain.ISAS.index(best):
        pytest.skip(f"this machine does no more than {best}")

    cache = cache_folder.made("sanitized")
    told = {"SD_PLUGIN_CPU_ISA": isa, cases.SHARE: str(SHARE)}
    done = pytest_under("both", cache, "-k", "cpu", *KERNEL_TESTS, **told)

    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 0
    assert "skipped" not in done.stdout
    *old, library = sorted(cache.glob(f"sd_cpu-{isa}-*.so"), key=lambda path: path.stat().st_mtime_ns)
    for path in old:  # of other sources
        path.unlink(missing_ok=True)
    content = library.read_bytes()
    assert b"__asan_report_" in content and b"__ubsan_handle_" in content


FAULTY = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT float element(const float* x, long i) { return x[i]; }
EXPORT int twice(int x) { return 2 * x; }
"""
FAULTY_TEST = """
import ctypes
from pathlib import Path
import pytest
import torch
from sd_plugin.kernels.cpu import build, toolchain

library = build.build(Path(__file__).parent).library
library.element.argtypes, library.element.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float

@pytest.mark.parametrize("index", [99, 100])
def test_address(index):
    assert library.element(torch.empty(100).fill_(7).data_ptr(), index) == 7 or index == 100

@pytest.mark.parametrize("value", [1, 2**30])
def test_undefined(value):
    assert library.twice(value) in (2, -(2**31))
"""


@pytest.mark.parametrize(
    ("sanitizer", "report"),
    [
        ("address", r"AddressSanitizer: heap-buffer-overflow[\s\S]*0 bytes (?:to the right of|after) 400-byte region"),
        ("undefined", r"faulty\.cpp:4:\d+: runtime error: signed integer overflow"),
    ],
    ids=["address", "undefined"],
)
def test_a_fault_is_found(sanitizer: str, report: str, tmp_path: Path) -> None:
    """What is above would fail if there were something to find."""
    (tmp_path / "faulty.cpp").write_text(FAULTY)
    test = tmp_path / "test_faulty.py"
    test.write_text(FAULTY_TEST)
    right, wrong = {"address": ("99", "100"), "undefined": ("1", str(2**30))}[sanitizer]

    done = pytest_under(sanitizer, tmp_path / "cache", f"{test}::test_{sanitizer}[{right}]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout

    done = pytest_under(sanitizer, tmp_path / "cache", f"{test}::test_{sanitizer}[{wrong}]")
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stdout + done.stderr
