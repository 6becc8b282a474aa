#!/usr/bin/env python
"""What the CUDA kernels need of a multiprocessor, and the least they can take; no GPU is needed.

    python benchmarks/cuda_resources.py [--json benchmarks/results/cuda_resources.json] [--into docs/kernels.md]
    python benchmarks/cuda_resources.py --no-compile --into docs/kernels.md       # from the file as it is
    python benchmarks/cuda_resources.py --check

The backend runs on tensors without memory, with a driver that only notes what it is told to launch, so the sizes are
those of the code; NVRTC compiles what was to be launched. Bytes, operations and floors are computed from the shapes.
Measured times come from the files of ``scripts/gpu_check.py`` beside the JSON file, as far as there are any.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

try:
    import typer
except ImportError:
    print("cuda_resources.py needs typer: pip install '.[bench]'", file=sys.stderr)
    raise SystemExit(2) from None

from cuda_tables import TABLES, Measured, measurements, updated
from cuda_work import launched, unit_of

from sd_plugin.errors import UsageError
from sd_plugin.kernels.cuda import sources, thread_locale
from sd_plugin.kernels.cuda.driver import Unit

# One line for what is wrong with a command line, as the programs in scripts/ have it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from typer_program import run_app

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda_resources.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
#: What makes both anew.
AGAIN = "benchmarks/cuda_resources.py --json benchmarks/results/cuda_resources.json --into docs/kernels.md"
KIND, SCHEMA = "sd-plugin cuda resources", 1

#: Compute capabilities that every kernel is compiled for.
ARCHITECTURES = (80, 90)
_DISTRIBUTIONS = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc")
_USED = re.compile(
    r"Function properties for (\w+)\n[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
    re.DOTALL,
)


# ---- compiling -------------------------------------------------------------------------------------------------------


class CompileError(RuntimeError):
    """NVRTC is missing, or does not take a source."""


class Resources(NamedTuple):
    """Of one kernel."""

    registers: int
    stack: int  #: bytes of local memory
    spills: int  #: bytes stored and loaded


def _distribution() -> tuple[str, metadata.Distribution]:
    for name in _DISTRIBUTIONS:
        try:
            return name, metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    raise CompileError(f"NVRTC is not installed: pip install {_DISTRIBUTIONS[0]}")


@cache
def nvrtc() -> ctypes.CDLL:
    """The library of an installed NVRTC wheel.

    Raises:
        CompileError: none is installed.
    """
    name, distribution = _distribution()
    for file in distribution.files or []:
        if re.fullmatch(r"libnvrtc\.so\.\d+", file.name):
            return ctypes.CDLL(str(file.locate()))
    raise CompileError(f"NVRTC's library is missing: pip install --force-reinstall {name}")


def compile_unit(unit: Unit, architecture: int) -> tuple[dict[str, Resources], int]:
    """Compile ``unit`` for ``architecture``, such as 90.

    Returns:
        What each of its kernels needs, and the size of the result.

    Raises:
        CompileError: NVRTC is missing or does not take it; its log.
    """
    library, program = nvrtc(), ctypes.c_void_p()
    source = sources.read(unit.source).encode()
    # CuPy adds -ftz=true to whatever it is asked for.
    asked = (*unit.options(), "-ftz=true", f"-arch=sm_{architecture}", "--ptxas-options=-v")
    options = [option.encode() for option in asked]
    library.nvrtcCreateProgram(ctypes.byref(program), source, f"{unit.source}.cu".encode(), 0, None, None)
    try:
        with thread_locale.kept():
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


def digest(source: str) -> str:
    """Of a translation unit's code, whatever its comments and its layout are."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", sources.read(source), flags=re.DOTALL)
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()[:16]


# ---- the file --------------------------------------------------------------------------------------------------------


def _entries(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every launch of a file."""
    passes = [layer[way] for layer in document["layers"] for way in ("forward", "backward") if way in layer]
    return [*passes, *document["kernels"]]


def measure() -> dict[str, Any]:
    """The file: what is launched, and what NVRTC says of it.

    Raises:
        CompileError: NVRTC is missing or does not take a source.
    """
    told = launched()
    units = dict.fromkeys(entry["unit"] for entry in _entries(told))
    compiled = {}
    for key in units:
        of_unit: dict[str, dict[str, list[int]]] = {}
        for architecture in ARCHITECTURES:
            for name, needs in sorted(compile_unit(unit_of(key), architecture)[0].items()):
                of_unit.setdefault(name, {})[str(architecture)] = list(needs)
        compiled[key] = of_unit
    name, distribution = _distribution()
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "nvrtc": {"package": name, "version": distribution.version},
        "architectures": list(ARCHITECTURES),
        "sources": {source: digest(source) for source in sorted({unit_of(key).source for key in units})},
        **told,
        "compiled": compiled,
    }


# ---- the program -----------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def load(path: Path) -> dict[str, Any]:
    """A file that :func:`measure` made.

    Raises:
        UsageError: it is another.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    if not isinstance(document, dict) or (document.get("kind"), document.get("schema")) != (KIND, SCHEMA):
        raise UsageError(f"--json {path.name}: not a file of this program")
    return document


def stale(document: Mapping[str, Any], into: Path, measured: Sequence[Measured]) -> list[str]:
    """Why ``into`` is not what the code and ``document`` give; without compiling."""
    reasons = [
        f"{source}.cu has changed since" for source, known in document["sources"].items() if digest(source) != known
    ]
    now = json.loads(json.dumps(launched()))
    reasons += [f"the backend gives other {name}" for name, found in now.items() if document[name] != found]
    text = into.read_text(encoding="utf-8")
    if text != updated(text, document, measured, into.name):
        reasons.append(f"the tables of {into.name} are not those of the file")
    return reasons


def _written(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _as_text(value: Any, indent: int = 0) -> str:
    """JSON in which what fits into a line is one, and short entries share lines."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or len(line) + indent <= _LINE:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_as_text(part, indent + 1)}" for key, part in value.items()]
        plain = [not isinstance(part, (dict, list)) for part in value.values()]
    else:
        parts, plain = [_as_text(part, indent + 1) for part in value], [False] * len(value)
    lines = [parts[0]]
    for part, joins, before in zip(parts[1:], plain[1:], plain[:-1], strict=True):
        if joins and before and len(lines[-1]) + len(part) + indent < _LINE:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    inner = " " * (indent + 1)
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{' ' * indent}{closing}"


_LINE = 116


@app.command()
def main(
    file: Annotated[Path | None, typer.Option("--json", help="The file to write, or to read.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put the tables between the marks of this document.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the document is out of date.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Take the file as it is.")] = False,
) -> None:
    """Compile the CUDA kernels, and tell what they need; without --json and --into, print the tables."""
    try:
        if check or no_compile:
            document = load(file or RESULTS)
        else:
            document = measure()
            if file is not None:
                _written(file, _as_text(document) + "\n")
        measured = measurements((file or RESULTS).parent)
        if check:
            if reasons := stale(document, into or DOCUMENT, measured):
                print(f"cuda_resources.py: {'; '.join(reasons)}: run {AGAIN}", file=sys.stderr)
                raise typer.Exit(1)
            return
        if into is not None:
            _written(into, updated(into.read_text(encoding="utf-8"), document, measured, into.name))
        elif file is None or no_compile:
            print("\n\n".join(make(document, measured) for make in TABLES.values()))
    except (OSError, UsageError, CompileError) as error:
        print(f"cuda_resources.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    run_app(app, "cuda_resources.py")
