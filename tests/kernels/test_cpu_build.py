"""Compiling the CPU kernels at first use: what is built, where it is kept, and what happens when it cannot be.

A tiny stand-in takes the place of the kernels' sources, and no test touches the user's own cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sd_plugin.kernels.cpu import build, library, toolchain
from sd_plugin.kernels.cpu.toolchain import BuildError, Target

from ..more import more
from ..patience import PATIENCE

STAND_IN = """
#include <omp.h>
#include "answer.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int sd_answer() { return ANSWER; }
EXPORT int sd_isa() { return SD_ISA; }
EXPORT int sd_threads(int wanted) {
  int threads = 0;
#pragma omp parallel num_threads(wanted) reduction(+ : threads)
  threads += 1;
  return threads;
}
"""
VARIABLES = ("SD_PLUGIN_CPU_ISA", "SD_PLUGIN_CPU_SANITIZE", "SD_PLUGIN_CXX", "SD_PLUGIN_BACKEND", "CXX")
MESSAGE = r"sd-plugin: compiling the CPU kernels for this machine \(once; about \d+ s\)\n"


@dataclass
class Compiler:
    """A compiler that counts how often it compiles, in a folder of its own that can stand as PATH."""

    path: Path
    log: Path

    @property
    def calls(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


WriteCompiler = Callable[..., Compiler]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache and a directory for temporary files of each test's own; nothing asked for."""
    before = os.umask(0o022)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    os.umask(before)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """The folder of sources that takes the place of the kernels'."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "stand_in.cpp").write_text(STAND_IN)
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    return folder


@pytest.fixture
def write_compiler(tmp_path: Path) -> WriteCompiler:
    """Writes a script that passes everything on to g++."""

    def write(name: str = "g++", folder: str = "bin", version: str = "", before: str = "") -> Compiler:
        path, log = tmp_path / folder / name, tmp_path / f"{folder}-{name}.log"
        path.parent.mkdir(exist_ok=True)
        answer = f"echo '{version}'; exit 0" if version else f'PATH="{os.environ["PATH"]}" exec g++ "$@"'
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *--version*) {answer};; esac\necho compiled >> "{log}"\n'
            f'PATH="{os.environ["PATH"]}"\n{before}\nexec g++ "$@"\n'
        )
        path.chmod(0o755)
        return Compiler(path, log)

    return write


@pytest.fixture
def compiler(write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """The counting compiler, in use."""
    found = write_compiler()
    monkeypatch.setenv("SD_PLUGIN_CXX", str(found.path))
    return found


def script(code: str, **environ: str) -> str:
    """The output of a program that has to succeed."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def everything_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_compiles_once(stand_in: Path, compiler: Compiler, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    built = build.build(stand_in)
    assert built.library.sd_answer() == 42
    assert compiler.calls == 1
    assert re.fullmatch(MESSAGE, capfd.readouterr().err)
    assert re.fullmatch(rf"sd_cpu-{built.isa}-[0-9a-f]{{16}}-[0-9a-f]{{8}}\.so", built.path.name)
    assert everything_in(tmp_path / "cache") == {".lock", built.path.name}
    assert not any((tmp_path / "temporary").iterdir())

    again = build.build(stand_in)
    assert again.path == built.path
    assert again.library.sd_answer() == 42
    assert compiler.calls == 1
    assert capfd.readouterr() == ("", "")


def test_whatever_changes_the_library_changes_its_name(
    stand_in: Path, write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name() -> str:
        return build._name(Target.detect(), build.sources(stand_in))

    names = [name()]
    (stand_in / "answer.h").write_text("#define ANSWER 43\n")
    names.append(name())
    (stand_in / "stand_in.cpp").write_text(STAND_IN + "\n")
    names.append(name())
    (stand_in / "more.h").write_text("")
    names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "_FLAGS", (*toolchain._FLAGS, "-g"))
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setenv("SD_PLUGIN_CPU_SANITIZE", "undefined")
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "openmp_runtime", lambda: Path("libgomp-0123abcd.so.1"))
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        names.append(name())
    for version in ("g++ (Debian) 99.1", "g++ (Debian) 99.2"):
        monkeypatch.setenv("SD_PLUGIN_CXX", str(write_compiler(version=version).path))
        names.append(name())
    monkeypatch.setenv("SD_PLUGIN_CXX", f"{write_compiler(version=version).path} -static-libgcc")
    names.append(name())
    monkeypatch.setenv("SD_PLUGIN_CXX", str(write_compiler(folder="elsewhere", version=version).path))
    names.append(name())
    for isa in toolchain.ISAS:
        monkeypatch.setattr(toolchain, "wanted_isa", lambda *_, isa=isa: isa)
        names.append(name())
    expected = len(names) - 1  # One of the instruction sets is what all others were for.
    assert len(set(names)) == expected, names


@pytest.mark.parametrize("locks", [True, False])
def test_processes_may_race(
    stand_in: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "this file system has no locks")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    # Forked, so that they start off together: importing torch takes longer, and less evenly, than compiling this.
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.SimpleQueue()

    def race() -> None:
        start.wait(PATIENCE)
        built = build.build(stand_in)
        answers.put((built.path.name, built.library.sd_answer()))

    racers = [context.Process(target=race) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(PATIENCE)
        assert racer.exitcode == 0
    (library,) = libraries(tmp_path / "cache")
    assert [answers.get() for _ in racers] == [(library.name, 42)] * 4
    assert everything_in(tmp_path / "cache") == {".lock", library.name}
    assert compiler.calls == 1 or not locks


def test_a_lock_that_is_never_given_back_does_not_stop_it(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_LOCK_SECONDS", 0.2)
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert build.build(stand_in).library.sd_answer() == 42


@pytest.mark.parametrize("damage", ["garbage", *more("empty", "short")])
def test_a_damaged_library_is_built_again(stand_in: Path, compiler: Compiler, tmp_path: Path, damage: str) -> None:
    def build_elsewhere() -> None:
        """A process that has loaded a library finds that, whatever became of its file."""
        process = multiprocessing.get_context("fork").Process(target=build.build, args=(stand_in,))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode == 0

    build_elsewhere()
    (library,) = libraries(tmp_path / "cache")
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes({"garbage": b"x" * len(whole), "empty": b"", "short": whole[: len(whole) // 2]}[damage])
    build_elsewhere()
    assert compiler.calls == 2
    assert libraries(tmp_path / "cache") == [library]
    assert library.stat().st_size == len(whole)
    build.build(stand_in)
    assert compiler.calls == 2


def test_a_library_that_never_loads_is_an_error(stand_in: Path, compiler: Compiler) -> None:
    (stand_in / "stand_in.cpp").write_text('extern "C" int nowhere(); int f() { return nowhere(); }')
    with pytest.raises(BuildError, match=r"cannot be stored or loaded .*undefined symbol: nowhere.*SD_PLUGIN_CACHE"):
        build.build(stand_in)
    assert compiler.calls == 2, "once in each directory, which may be mounted noexec"


def test_a_directory_that_cannot_be_written_is_read(stand_in: Path, compiler: Compiler, tmp_path: Path) -> None:
    built = build.build(stand_in)
    cache = tmp_path / "cache"
    (cache / ".lock").unlink()
    cache.chmod(0o500)
    before = cache.stat().st_mtime_ns
    try:
        # The administrator can write everywhere, so look that nothing tried to.
        assert build.build(stand_in).path == built.path
        assert cache.stat().st_mtime_ns == before
        assert compiler.calls == 1
        assert not any((tmp_path / "temporary").iterdir())
    finally:
        cache.chmod(0o700)


@pytest.mark.parametrize("why", ["no directory", "full"])
def test_a_cache_that_takes_nothing_is_replaced_by_a_private_temporary_directory(
    stand_in: Path, write_compiler: WriteCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    before = ""
    if why == "no directory":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    else:
        full = "cannot write: No space left on device"
        before = f'case "$*" in *{tmp_path / "cache"}*) echo "{full}" >&2; exit 1;; esac'
    compiler = write_compiler(before=before)
    monkeypatch.setenv("SD_PLUGIN_CXX", str(compiler.path))

    built = build.build(stand_in)

    assert built.library.sd_answer() == 42
    folder = tmp_path / "temporary" / f"sd-plugin-{os.geteuid()}"
    assert built.path.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    calls = compiler.calls
    assert build.build(stand_in).path == built.path
    assert compiler.calls == calls
    if why == "full":
        assert everything_in(tmp_path / "cache") == {".lock"}


PLANTED = """
#include <fstream>
struct Planted { Planted() { std::ofstream("MARK") << "run"; } } planted;
extern "C" __attribute__((visibility("default"))) int sd_answer() { return 13; }
"""
STRANGER = 12345


def plant(library: Path, tmp_path: Path) -> Path:
    """Put another library in the place of ``library``, with a checksum of its own; what it writes when it is loaded."""
    mark, source, made = tmp_path / "mark", tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(PLANTED.replace("MARK", str(mark)))
    subprocess.run(["g++", "-shared", "-fPIC", "-o", made, source], check=True)
    content = made.read_bytes()
    library.unlink()
    library.write_bytes(content + hashlib.sha256(content).digest())
    return mark


def only_the_administrator_gives_files_away() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")


@pytest.mark.parametrize(
    ("variable", "what", "mode", "owner"),
    [
        ("SD_PLUGIN_CACHE", "cache", 0o777, None), ("SD_PLUGIN_CACHE", "cache", 0o700, STRANGER),
        ("SD_PLUGIN_CACHE", "library", 0o666, None), ("SD_PLUGIN_CACHE", "library", 0o644, STRANGER),
        ("XDG_CACHE_HOME", "cache", 0o777, None), ("HOME", "library", 0o644, STRANGER),
        *more(
            ("XDG_CACHE_HOME", "cache", 0o700, STRANGER), ("XDG_CACHE_HOME", "library", 0o666, None),
            ("XDG_CACHE_HOME", "library", 0o644, STRANGER), ("HOME", "cache", 0o777, None),
            ("HOME", "cache", 0o700, STRANGER), ("HOME", "library", 0o666, None),
        ),
    ],
)  # fmt: skip
def test_a_library_that_others_may_have_written_is_not_loaded(
    stand_in: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    what: str,
    mode: int,
    owner: int | None,
    variable: str,
) -> None:
    folders = {"SD_PLUGIN_CACHE": "", "XDG_CACHE_HOME": "sd-plugin", "HOME": ".cache/sd-plugin"}
    monkeypatch.delenv("SD_PLUGIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "chosen"))
    library = build.build(stand_in).path
    assert library.parent == tmp_path / "chosen" / folders[variable]
    mark = plant(library, tmp_path)
    changed = library.parent if what == "cache" else library
    changed.chmod(mode)
    if owner is not None:
        only_the_administrator_gives_files_away()
        os.chown(changed, owner, owner)
    capfd.readouterr()
    for _ in range(2):
        assert build.build(stand_in).library.sd_answer() == 42
    assert not mark.exists()
    told = [line for line in capfd.readouterr().err.splitlines() if "the cache is not used as it is" in line]
    assert len(told) == 1
    assert str(changed) in told[0]
    assert ("chmod go-w" in told[0]) == (owner is None)
    assert "SD_PLUGIN_CACHE" in told[0]
    temporary = tmp_path / "temporary" / f"sd-plugin-{os.geteuid()}"
    assert build.build(stand_in).path.parent == (temporary if what == "cache" else library.parent)


@pytest.mark.parametrize("how", ["writable by others", "a link", "somebody else's"])
def test_a_temporary_directory_of_others_is_not_trusted(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    built = build.build(stand_in)
    folder = built.path.parent
    if how == "writable by others":
        folder.chmod(0o777)
    elif how == "a link":
        folder.rename(tmp_path / "theirs")
        folder.symlink_to(tmp_path / "theirs")
    else:
        only_the_administrator_gives_files_away()
        os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(BuildError, match=rf"{re.escape(str(folder))}.*set SD_PLUGIN_CACHE"):
        build.build(stand_in)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_is_compiled_is_safe_whatever_the_umask(stand_in: Path, compiler: Compiler, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = build.build(stand_in).path
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.stat().st_mode & 0o022
    assert build.build(stand_in).path == path
    assert compiler.calls == 1


def test_a_library_that_lacks_a_function_is_built_again(
    stand_in: Path, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this very process, where the former one would be found under its name."""
    source = stand_in / "stand_in.cpp"
    monkeypatch.setattr(build, "_name", lambda target, files: "sd_cpu-the-same.so")
    source.write_text(STAND_IN.replace("EXPORT int sd_isa", "static int sd_isa"))
    assert build.build(stand_in).library.sd_answer() == 42
    source.write_text(STAND_IN)
    for _ in range(2):
        complete = build.build(stand_in, exports=["sd_answer", "sd_isa"])
        assert complete.library.sd_isa() > 0
        assert complete.path.parent == tmp_path / "cache"
        assert compiler.calls == 2
    with pytest.raises(BuildError, match="lacks sd_missing"):
        build.build(stand_in, exports=["sd_missing"])


def test_the_functions_of_the_kernels_are_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    demanded: list[str] = []
    monkeypatch.setattr(library, "build", lambda exports: demanded.extend(exports))
    library.built.__wrapped__()
    assert {"sd_pack_f32", "sd_lstm_backward_f64", "sd_panel_f32", "sd_padded_rows_f64"} <= set(demanded)


def test_what_killed_compilations_left_is_removed(
    stand_in: Path, tmp_path: Path, write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    monkeypatch.setenv("SD_PLUGIN_CXX", str(write_compiler("slow", before=f'touch "{started}"; exec sleep 20').path))
    killed = multiprocessing.get_context("fork").Process(target=build.build, args=(stand_in,))
    killed.start()
    while not started.exists():
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    cache = tmp_path / "cache"
    (left,) = cache.glob(".compiling-*")
    old, others = cache / ".compiling-abcdefgh", cache / ".compiling-ijklmnop"
    old.mkdir()
    others.mkdir()
    os.utime(old, (0, 0))
    (others / "mine").touch()
    monkeypatch.setenv("SD_PLUGIN_CXX", str(write_compiler().path))
    build.build(stand_in)
    assert not left.exists()
    assert not old.exists(), "of an earlier version, which nobody works on any more"
    assert others.exists(), "of an earlier version, which somebody may work on"


def test_sources_that_do_not_compile(stand_in: Path, compiler: Compiler, tmp_path: Path) -> None:
    (stand_in / "stand_in.cpp").write_text("int f() { return missing; }\n")
    with pytest.raises(BuildError) as caught:
        build.build(stand_in)
    (message,) = str(caught.value).splitlines()
    log = Path(message.rpartition("log: ")[2])
    assert log.parent == tmp_path / "cache"
    assert "was not declared" in message
    assert "set SD_PLUGIN_CXX" in message
    text = log.read_text()
    assert text.startswith(str(compiler.path))
    assert "missing" in text
    assert everything_in(tmp_path / "cache") == {".lock", log.name}


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="sources of the CPU kernels are missing; install sd-plugin again"):
        build.sources(tmp_path)


def test_the_kernels_have_sources() -> None:
    assert "sd_cpu.cpp" in {path.name for path in build.sources()}


def test_no_compiler(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build(stand_in)
    monkeypatch.setenv("PATH", str(tmp_path / "temporary"))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found; install one, such as g\+\+"):
        Target.detect()
    # On the nodes of a cluster, the home directory may be all they share with the machine that has a compiler.
    assert build.build(stand_in).path == built.path
    (stand_in / "answer.h").write_text("#define ANSWER 43\n")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found; install one, such as g\+\+"):
        build.build(stand_in)


def test_compilers_are_tried_in_order(
    stand_in: Path, write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash = write_compiler("g++", before="exit 3", version="g++ (Broken) 1")
    works = write_compiler("c++", version="c++ (Working) 1")
    mute = write_compiler("clang++", version="")
    mute.path.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", str(crash.path.parent))
    assert Target.detect().compiler == (str(crash.path),)

    assert build.build(stand_in).library.sd_answer() == 42
    assert (crash.calls, works.calls) == (1, 1)
    # What is in the cache comes before what might compile.
    assert build.build(stand_in).target == Target(toolchain.wanted_isa(), "", (str(works.path),), "c++ (Working) 1")
    assert (crash.calls, works.calls) == (1, 1)

    works.path.unlink()
    (stand_in / "answer.h").write_text("#define ANSWER 43\n")
    with pytest.raises(BuildError, match=r"g\+\+ cannot compile the CPU kernels \(it says nothing\)"):
        build.build(stand_in)


def test_two_names_of_one_compiler_are_tried_once(
    stand_in: Path, write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilers = [write_compiler(name, before="exit 1", version=f"{name} (Same) 1") for name in ("g++", "c++")]
    monkeypatch.setenv("PATH", str(compilers[0].path.parent))
    with pytest.raises(BuildError):
        build.build(stand_in)
    assert [compiler.calls for compiler in compilers] == [1, 0]


def test_a_compiler_by_variable(stand_in: Path, write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = write_compiler("mine")
    monkeypatch.setenv("CXX", f"{chosen.path} -DUNUSED")
    assert Target.detect().compiler == (str(chosen.path), "-DUNUSED")
    # CXX may be meant for something else altogether.
    broken = write_compiler("wrapper")
    monkeypatch.setenv("CXX", f"{broken.path} -mno-such-machine")
    built = build.build(stand_in)
    assert built.target is not None
    assert built.target.compiler[1:] == ()
    assert broken.calls == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert Path(Target.detect().compiler[0]).name in ("g++", "c++")
    monkeypatch.setenv("SD_PLUGIN_CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="SD_PLUGIN_CXX=no-such-compiler: no such program"):
        Target.detect()
    monkeypatch.setenv("SD_PLUGIN_CXX", "/dev/null")
    with pytest.raises(BuildError, match="SD_PLUGIN_CXX=/dev/null: no such program"):
        build.build(stand_in)
    chosen.path.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("SD_PLUGIN_CXX", str(chosen.path))
    with pytest.raises(BuildError, match=r"mine does not run; install a C\+\+ compiler such as g\+\+"):
        build.build(stand_in)


def test_clang_is_not_used_beside_libgomp(
    stand_in: Path, write_compiler: WriteCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls need LLVM's runtime, and two runtimes in one process mistake each other's threads."""
    clang = write_compiler("clang++", version="Debian clang version 14.0.6")
    monkeypatch.setenv("SD_PLUGIN_CXX", str(clang.path))
    openmp = toolchain.openmp_runtime()
    if openmp is None or "libgomp" not in openmp.name:
        pytest.skip("this torch does not run on libgomp")
    with pytest.raises(
        BuildError, match=r"clang cannot use the OpenMP runtime of this torch \(libgomp\); install g\+\+"
    ):
        build.build(stand_in)
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "openmp_runtime", lambda: None)
        assert Target.detect().is_clang
    # One that does not give itself away, except by what it makes.
    other = write_compiler("icpx", version="Some DPC++/C++ Compiler 1", before="set -- -DTRACE=__kmpc_fork_call $@")
    (stand_in / "answer.h").write_text('#define ANSWER 42\nextern "C" void TRACE();\nvoid trace() { TRACE(); }\n')
    monkeypatch.setenv("SD_PLUGIN_CXX", str(other.path))
    with pytest.raises(BuildError, match=r"clang cannot use the OpenMP runtime of this torch .*install g\+\+"):
        build.build(stand_in)
    assert other.calls == 1


@pytest.mark.parametrize(
    ("flags", "capability", "expected"),
    [
        ("avx2 fma avx512f avx512bw avx512dq avx512vl sse", "AVX512", "avx512"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "AVX2", "avx2"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "DEFAULT", "portable"),
        ("avx2 fma avx512f avx512dq avx512vl", "AVX512", "avx2"),
        ("avx2 avx512f avx512bw avx512dq avx512vl", "AVX512", "portable"),
        ("avx2", "AVX2", "portable"),
        ("", "NO AVX", "portable"),
    ],
)
def test_the_instruction_set_is_what_machine_and_torch_do(
    monkeypatch: pytest.MonkeyPatch, flags: str, capability: str, expected: str
) -> None:
    monkeypatch.setattr(toolchain, "_cpuinfo", lambda key: flags.split() if key == "flags" else [])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert Target.detect().isa == expected


def test_an_instruction_set_by_variable(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    able = toolchain.ISAS[: toolchain.ISAS.index(toolchain.machine_isa()) + 1]
    defines = {"avx512": 512, "avx2": 256, "portable": 128}
    for isa in able:
        monkeypatch.setenv("SD_PLUGIN_CPU_ISA", isa.upper())
        assert build.build(stand_in).library.sd_isa() == defines[isa]
    monkeypatch.setenv("SD_PLUGIN_CPU_ISA", "sse9")
    with pytest.raises(BuildError, match="SD_PLUGIN_CPU_ISA=sse9 is no instruction set; valid: avx512, avx2, portable"):
        build.build(stand_in)
    monkeypatch.setattr(toolchain, "_cpuinfo", lambda key: ["avx2", "fma"])
    monkeypatch.setenv("SD_PLUGIN_CPU_ISA", "avx512")
    with pytest.raises(BuildError, match="SD_PLUGIN_CPU_ISA=avx512 cannot run on this machine; its best is avx2"):
        build.build(stand_in)


def test_arm_is_compiled_for_the_cpu_it_has(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = {"CPU implementer": ["0x41", "0x41"], "CPU part": ["0xd0c"], "Features": ["asimd", "sve"]}
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(toolchain, "_cpuinfo", lambda key: cpus.get(key, []))
    native, generic, *_ = toolchain.targets([])
    assert native.isa == "portable"
    assert ("-mcpu=native" in native.flags, "-mcpu=native" in generic.flags) == (True, False)
    files = build.sources(stand_in)
    before = build._name(native, files)
    cpus["CPU part"] = ["0xd40"]
    other, same, *_ = toolchain.targets([])
    assert build._name(other, files) != before, "a cache may be shared by machines with different CPUs"
    assert build._name(same, files) == build._name(generic, files)


def test_sanitizers_by_variable(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_PLUGIN_CPU_SANITIZE", "thread")
    with pytest.raises(BuildError, match="SANITIZE=thread is no sanitizer; valid: address, undefined, both"):
        build.build(stand_in)
    monkeypatch.setenv("SD_PLUGIN_CPU_SANITIZE", "address")
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        with pytest.raises(BuildError, match="SD_PLUGIN_CPU_SANITIZE=address needs LD_PRELOAD="):
            build.build(stand_in)


ONE_RUNTIME = """
import os, re
from pathlib import Path
import torch

def runtimes():
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"/\\S*(?:libgomp|libiomp|libomp)\\S*", maps))

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
x = torch.ones(2000, 2000)
x + x
before, running = runtimes(), threads()
from sd_plugin.kernels.cpu import build, library, toolchain
{prelude}
library = build.build(Path({folder!r})).library
assert library.sd_threads(2) == 2
x + x
print(sorted(runtimes() - before), len(before), threads() - running)
"""


def test_threads_are_those_of_torch(stand_in: Path) -> None:
    """One OpenMP runtime, one pool: a second one would spin against the first."""
    out = script(ONE_RUNTIME.format(folder=str(stand_in), prelude=""), OMP_NUM_THREADS="2")
    if toolchain.openmp_runtime() is None:
        pytest.skip("this torch has no OpenMP runtime to share")
    assert out == "[] 1 0\n"


def test_a_runtime_under_a_name_of_its_own_is_the_one_linked_to(stand_in: Path, tmp_path: Path) -> None:
    """As in wheels of torch that ship ``libgomp-<hash>.so.1``."""
    openmp = toolchain.openmp_runtime()
    if openmp is None or openmp.name != "libgomp.so.1":
        pytest.skip("made from a libgomp.so.1")
    renamed = tmp_path / "libgomX.so.1"
    renamed.write_bytes(openmp.read_bytes().replace(b"libgomp.so.1\0", b"libgomX.so.1\0"))
    prelude = f"""
import ctypes
ctypes.CDLL({str(renamed)!r})
toolchain.openmp_runtime = lambda: Path({str(renamed)!r})
"""
    out = script(ONE_RUNTIME.format(folder=str(stand_in), prelude=prelude), OMP_NUM_THREADS="2")
    assert out.startswith("[] 1 ")
    (library,) = libraries(tmp_path / "cache")
    assert b"libgomX.so.1\0" in library.read_bytes()
    assert b"libgomp.so.1\0" not in library.read_bytes()


def test_describe_names_no_path_of_this_machine(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build(stand_in)
    monkeypatch.setattr(library, "built", lambda: built)
    described = library.describe()
    assert described.keys() == {"isa", "compiler", "library", "openmp", "sanitize"}
    assert described["isa"] == Target.detect().isa
    assert described["compiler"] == Target.detect().version
    assert described["library"] == built.path.name
    assert not any("/" in value for value in described.values())


TRAINING_STEPS = """
import os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from sd_plugin import StructuredDropoutLSTM
    from sd_plugin.kernels import status
    lstm = StructuredDropoutLSTM(4, 6, num_layers=2, dropout=0.5)
    # First as if nothing else were wanted, then as by default.
    for backend in ("reference", "", ""):
        os.environ["SD_PLUGIN_BACKEND"] = backend
        y, _ = lstm(torch.randn(5, 3, 4))
        y.square().mean().backward()
        with torch.no_grad():
            for parameter in lstm.parameters():
                parameter -= 0.1 * parameter.grad
        print(len(caught))
print(status()["cpu"])
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def test_training_without_a_compiler_works_and_warns_once(tmp_path: Path) -> None:
    *told, reason, warning = script(TRAINING_STEPS, PATH=str(tmp_path / "temporary")).splitlines()
    assert told == ["0", "1", "1"], "warnings after each step"
    assert "no C++ compiler found" in reason
    assert warning.startswith("RuntimeWarning sd-plugin: the cpu backend cannot run")
    assert reason in warning
    assert "SD_PLUGIN_BACKEND=reference" in warning
