"""What wheels, editable installs and sdists put where."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = {"sd_plugin": "sd_plugin", "kernels": "sd_plugin/kernels", "patches": "sd_plugin/patches"}
SHIPPED = {".py", ".typed", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".json"}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected(source: Path) -> set[str]:
    files = {"sd_plugin.pth", "sd_plugin.start"}
    for folder, package in FOLDERS.items():
        for path in (source / folder).rglob("*"):
            if path.suffix in SHIPPED:
                files.add(f"{package}/{path.relative_to(source / folder).as_posix()}")
    return files


def build(hook: str, source: Path, target: Path) -> Path:
    """Calls a PEP 517 or 660 hook as pip does, and returns what it built."""
    target.mkdir(exist_ok=True)
    code = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    done = subprocess.run([sys.executable, "-c", code, hook, str(target)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


def test_the_wheel_holds_the_sources_and_the_startup_files_and_nothing_else(wheel, source):
    assert contents(wheel) == expected(source)


def test_native_sources_and_new_subpackages_are_shipped_without_being_listed(source, tmp_path):
    folder = source / "kernels" / "newly_added"
    folder.mkdir()
    for name in ("__init__.py", "kernel.cu", "kernel.cpp", "kernel.h"):
        (folder / name).touch()
    found = contents(build("build_wheel", source, tmp_path / "dist"))
    assert {f"sd_plugin/kernels/newly_added/{name.name}" for name in folder.iterdir()} <= found


def test_a_module_deleted_since_the_last_build_is_not_shipped(source, tmp_path):
    stale = source / "kernels" / "stale.py"
    stale.touch()
    assert "sd_plugin/kernels/stale.py" in contents(build("build_wheel", source, tmp_path / "first"))
    stale.unlink()
    assert "sd_plugin/kernels/stale.py" not in contents(build("build_wheel", source, tmp_path / "second"))


def test_an_sdist_builds_the_same_wheel(wheel, source, tmp_path):
    sdist = build("build_sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert contents(build("build_wheel", unpacked, tmp_path / "dist")) == contents(wheel)


IMPORTS = """
import importlib.util
import sd_plugin.kernels, sd_plugin.patches
from sd_plugin import __version__, _autoload
import sys
assert _autoload._finder in sys.meta_path
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("patches") is None
"""


@pytest.fixture
def editable(bare, source, tmp_path):
    wheel = build("build_editable", source, tmp_path / "editable")
    bare.pip("install", "--no-deps", "--no-index", "--quiet", wheel)
    return bare


def test_a_regular_install_maps_the_folders_to_packages(installed):
    # What is imported here must not need torch, so the kernels package is only looked for.
    installed.script(IMPORTS.replace("sd_plugin.kernels, ", ""))
    installed.script("import importlib.util; assert importlib.util.find_spec('sd_plugin.kernels')")


def test_an_editable_install_maps_the_folders_to_packages(editable, source):
    (source / "kernels" / "__init__.py").write_text("")
    editable.script(IMPORTS)
    shown = editable.script("import sd_plugin.kernels; print(sd_plugin.kernels.__file__)").stdout.strip()
    assert Path(shown).samefile(source / "kernels" / "__init__.py")


def test_an_editable_install_follows_new_files(editable, source):
    (source / "sd_plugin" / "newly_added.py").write_text("value = 3")
    assert editable.script("import sd_plugin.newly_added as m; print(m.value)").stdout == "3\n"


def test_the_startup_file_runs_after_that_of_an_editable_install(editable):
    names = sorted(path.name for path in editable.site.glob("*.pth"))
    assert len(names) == 2
    assert names[-1] == "sd_plugin.pth"


@pytest.mark.parametrize("how", ["regular", "editable"])
def test_uninstalling_leaves_nothing(how, bare, wheel, source, tmp_path):
    bare.write("another.py", "")  # pip removes a site-packages that it leaves empty
    before = bare.installed
    built = wheel if how == "regular" else build("build_editable", source, tmp_path / "editable")
    bare.pip("install", "--no-deps", "--no-index", "--quiet", built)
    assert (bare.folder / "bin" / "sd-plugin").exists()
    bare.script("import sd_plugin.patches")
    bare.pip("uninstall", "--yes", "--quiet", "sd-plugin")
    assert bare.installed == before
    assert not list(bare.site.glob("*sd_plugin*"))
    assert not (bare.folder / "bin" / "sd-plugin").exists()
    assert bare.run("-c", "pass").stderr == ""


def test_the_start_file_names_what_the_pth_file_calls(installed):
    lines = (installed.site / "sd_plugin.start").read_text().splitlines()
    (entry,) = [line for line in lines if not line.startswith("#")]
    installed.script(f"""
        import pkgutil
        from sd_plugin import _autoload
        assert pkgutil.resolve_name({entry!r}) is _autoload.install
    """)
    module, function = entry.split(":")
    called = f"from {module} import {function}\\n {function}()"
    assert called in (installed.site / "sd_plugin.pth").read_text()
