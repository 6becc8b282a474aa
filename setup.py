"""Build steps that pyproject.toml cannot express.

Everything declarative lives in pyproject.toml. Two things need code: the folders `kernels/` and `patches/`
are installed as sub-packages of `sd_plugin`, with whatever sub-packages they have today; and the start-up
files must land at the root of site-packages, where `site` looks for them, in regular and editable installs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build

# Installed package -> source folder. Nothing is ever installed as a top-level `kernels` or `patches`:
# those names belong to other distributions, which other libraries probe for.
PACKAGE_ROOTS = {
    "sd_plugin": "sd_plugin",
    "sd_plugin.kernels": "kernels",
    "sd_plugin.patches": "patches",
}

STARTUP_FILES = ("sd_plugin.pth", "sd_plugin.start")


def installed_packages() -> list[str]:
    """Every package to install, sub-packages found by looking, so that no list has to be kept up to date."""
    packages = []
    for name, folder in PACKAGE_ROOTS.items():
        packages.append(name)
        packages.extend(f"{name}.{sub}" for sub in find_packages(folder))
    return packages


class Build(build):
    """`build`, plus the start-up files, and never with left-overs of an earlier build."""

    sub_commands = [*build.sub_commands, ("build_startup", None)]

    def run(self) -> None:
        # setuptools only adds to build_lib: a module deleted since the last build would be shipped again.
        shutil.rmtree(Path(self.build_lib, "sd_plugin"), ignore_errors=True)
        super().run()


class BuildStartup(Command):
    """Puts the start-up files where they end up at the root of site-packages.

    A `setuptools.command.build.SubCommand`: `get_source_files` makes them part of the sdist.
    """

    description = "add the start-up files"
    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        # An editable build throws build_lib away, and packs what is in the folder it gives to `install`.
        root = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(root)
        for name in STARTUP_FILES:
            self.copy_file(name, str(Path(root, name)), preserve_mode=False)

    def get_source_files(self) -> list[str]:
        return list(STARTUP_FILES)

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(Path(self.build_lib, name)) for name in STARTUP_FILES]

    def get_output_mapping(self) -> dict[str, str]:
        return dict(zip(self.get_outputs(), STARTUP_FILES, strict=False))


setup(
    packages=installed_packages(),
    package_dir=PACKAGE_ROOTS,
    # Native sources are compiled on the user's machine at first use, so they travel as data of any package.
    package_data={
        "": [
            "py.typed",
            *(f"{folder}*.{kind}" for folder in ("", "src/") for kind in ("cpp", "cu", "cuh", "h", "hpp")),
        ],
        "sd_plugin.kernels.cuda": ["*.json"],
    },
    cmdclass={"build": Build, "build_startup": BuildStartup},
)
