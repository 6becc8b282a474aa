"""Real installs to test against: the wheel is built once, and every test gets its own copy of an environment.

Everything runs in child processes of throw-away environments, so that a test may break the installed package
and the interpreter that runs the tests never notices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
PROJECT_FOLDERS = ("sd_plugin", "kernels", "patches")
PROJECT_FILES = ("pyproject.toml", "setup.py", "sd_plugin.pth", "sd_plugin.start", "LICENSE", "README.md")


def clean_environ(**changes: str) -> dict[str, str]:
    """The environment variables of the tests' own process, without those that change Python or the plugin."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SD_PLUGIN", "COV_"))}
    return {**kept, **changes}


def run_checked(*command: object, cwd: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean_environ(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        return next((self.folder / "lib").glob("python*/site-packages"))

    @property
    def installed(self) -> set[str]:
        """Every file in site-packages except compiled ones, relative."""
        files = (path.relative_to(self.site) for path in self.site.rglob("*") if path.is_file())
        return {path.as_posix() for path in files if "__pycache__" not in path.parts}

    def pip(self, *args: object) -> None:
        run_checked(sys.executable, "-m", "pip", "--python", self.python, *args)

    def write(self, path: str, text: str) -> None:
        """Writes a file under site-packages."""
        target = self.site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))

    def run(self, *args: object, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs the environment's Python, in an empty folder unless told otherwise."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        return subprocess.run(
            [str(self.python), *(str(arg) for arg in args)],
            cwd=cwd or empty,
            env=clean_environ(**environ),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def script(self, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs `code`, which has to succeed."""
        done = self.run("-c", textwrap.dedent(code), **environ)
        assert done.returncode == 0, done.stderr
        return done


def new_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the project to build from: builds write into their source folder."""
    return copy_source(tmp_path / "source")


def copy_source(target: Path) -> Path:
    target.mkdir()
    for name in PROJECT_FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PROJECT_FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def build_wheel(project: Path, target: Path) -> Path:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run_checked(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", target, project)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_source(folder / "source"), folder / "dist")


@pytest.fixture(scope="session")
def pristine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = new_environment(tmp_path_factory.mktemp("pristine") / "venv")
    environment.pip("install", "--no-deps", "--no-index", "--quiet", wheel)
    return environment


@pytest.fixture
def installed(pristine: Environment, tmp_path: Path) -> Environment:
    """An environment with the wheel installed, for the test to do with as it likes."""
    return Environment(Path(shutil.copytree(pristine.folder, tmp_path / "venv", symlinks=True)))


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
    """An environment with nothing in it."""
    return new_environment(tmp_path / "bare")


FAKE_HOST = {
    "onmt/__init__.py": "value = 1\n",
    "onmt/bin/__init__.py": "",
    "onmt/bin/train.py": """
        import sys

        def main():
            print("trained", *sys.argv[1:])
        """,
}
FAKE_PATCH = """
    calls = []

    def on_import(module):
        calls.append(module.__name__)
    """


@pytest.fixture
def hosted(installed: Environment) -> Environment:
    """`installed`, with a stand-in for OpenNMT-py, and for its patch one that only records its calls."""
    for path, text in FAKE_HOST.items():
        installed.write(path, text)
    installed.write("sd_plugin/patches/opennmt.py", FAKE_PATCH)
    return installed


@pytest.fixture(scope="session")
def pristine_target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "target"
    options = ("--no-deps", "--no-index", "--quiet", "--target", folder)
    run_checked(sys.executable, "-m", "pip", "install", *options, wheel)
    return folder


@pytest.fixture
def target(pristine_target: Path, tmp_path: Path) -> Path:
    """A `pip install --target` folder, which has no working start-up files, with the same stand-ins."""
    folder = Path(shutil.copytree(pristine_target, tmp_path / "target", symlinks=True))
    entry_points = "[console_scripts]\nonmt_train = onmt.bin.train:main\n"
    files = {
        **FAKE_HOST,
        "sd_plugin/patches/opennmt.py": FAKE_PATCH,
        "fake_onmt-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: fake-onmt\nVersion: 1\n",
        "fake_onmt-1.dist-info/entry_points.txt": entry_points,
    }
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text))
    return folder
