"""`python -m sd_plugin PROGRAM`, in an environment whose start-up files are not read."""

from __future__ import annotations

import os
import textwrap

import pytest

import sd_plugin


@pytest.fixture
def launch(bare, target, tmp_path):
    """Runs `python -m sd_plugin ARGS` with a --target install on PYTHONPATH."""
    folder = tmp_path / "work"
    folder.mkdir()

    def launch(*args, python_options=(), cwd=folder, **environ):
        return bare.run(*python_options, "-m", "sd_plugin", *args, cwd=cwd, PYTHONPATH=os.fspath(target), **environ)

    launch.folder = folder
    return launch


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def single_error(done):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("sd-plugin: error: ")
    return line


REPORT = """
import sys
import onmt
from sd_plugin.patches.opennmt import calls
print(__name__, *calls, *sys.argv[1:])
"""


def test_the_startup_files_are_not_read_here(bare, target):
    code = "import sys; assert 'sd_plugin' not in sys.modules; import sd_plugin"
    done = bare.run("-c", code, PYTHONPATH=os.fspath(target))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("python_options", [(), ("-S",)])
def test_a_script_is_run_as_main_with_the_hook(launch, python_options):
    write(launch.folder / "program.py", REPORT)
    done = launch("program.py", "--flag", "-m", python_options=python_options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ onmt --flag -m\n", "")


def test_a_script_finds_its_neighbours_and_not_those_of_the_working_directory(launch, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write(folder / "neighbour.py", "")
    write(launch.folder / "bystander.py", "")
    program = write(
        folder / "program.py",
        """
        import importlib.util, sys
        import neighbour
        assert importlib.util.find_spec("bystander") is None
        assert sys.argv == [__file__, "x"]
        """,
    )
    done = launch(program, "x")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_module_is_run_as_main_with_the_hook(launch):
    write(launch.folder / "program.py", REPORT)
    done = launch("-m", "program", "a", "b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ onmt a b\n", "")


def test_a_package_is_run_by_its_main_module(launch):
    (launch.folder / "package").mkdir()
    write(launch.folder / "package" / "__init__.py", "")
    assert "'package'" in single_error(launch("-m", "package"))
    write(launch.folder / "package" / "__main__.py", REPORT)
    assert launch("-m", "package", "a").stdout == "__main__ onmt a\n"


def test_an_installed_command_is_run_with_the_hook(launch, target):
    write(
        target / "onmt" / "bin" / "train.py",
        """
        import os, sys

        def main():
            from sd_plugin.patches.opennmt import calls
            print(os.path.basename(sys.argv[0]), *sys.argv[1:], *calls)
            return 5
        """,
    )
    done = launch("onmt_train", "-config", "x.yaml")
    assert (done.returncode, done.stderr) == (5, "")
    assert done.stdout == "onmt_train -config x.yaml onmt onmt.bin.train\n"


def test_the_console_command_does_the_same(hosted, tmp_path):
    program = write(tmp_path / "program.py", REPORT)
    done = hosted.run(hosted.folder / "bin" / "sd-plugin", program, "a")
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ onmt a\n", "")


def test_the_console_command_runs_modules_of_the_working_directory(hosted, tmp_path):
    write(tmp_path / "program.py", REPORT)
    done = hosted.run(hosted.folder / "bin" / "sd-plugin", "-m", "program", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ onmt\n", "")


def test_switched_off_the_program_runs_without_the_hook(launch):
    write(launch.folder / "program.py", "import onmt, sys; assert 'sd_plugin.patches' not in sys.modules")
    assert launch("program.py", SD_PLUGIN="0").returncode == 0


@pytest.mark.parametrize(("value", "code"), [("0", 0), ("7", 7), ("None", 0), ("'message'", 1)])
def test_exit_codes_pass_through(launch, value, code):
    write(launch.folder / "program.py", f"raise SystemExit({value})")
    assert launch("program.py").returncode == code


def test_a_failing_program_shows_its_traceback(launch):
    write(launch.folder / "program.py", "1 / 0")
    done = launch("program.py")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "program.py" in done.stderr


def test_a_usage_error_of_the_program_is_one_line(launch):
    write(
        launch.folder / "program.py",
        """
        from sd_plugin.errors import UsageError
        raise UsageError("no such mode")
        """,
    )
    assert single_error(launch("program.py")) == "sd-plugin: error: no such mode"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["onmt_trian"], "'onmt_trian'"),
        (["missing.py"], "'missing.py'"),
        (["-m", "no.such.module"], "'no.such.module'"),
        (["-m", "onmt.bin.nothing"], "'onmt.bin.nothing'"),
        (["-m"], "-m"),
        (["--verbose", "onmt_train"], "--verbose"),
    ],
)
def test_an_unknown_program_is_one_line_with_an_example(launch, args, named):
    line = single_error(launch(*args))
    assert named in line
    assert "python -m sd_plugin " in line


def test_an_import_error_inside_a_module_is_the_programs_own(launch):
    write(launch.folder / "program.py", "import no_such_module")
    done = launch("-m", "program")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in done.stderr


def test_help_and_version(launch):
    shown = launch("--help")
    assert shown.returncode == 0
    assert "onmt_train" in shown.stdout
    assert "SD_PLUGIN" in shown.stdout
    assert launch("--version").stdout == f"sd-plugin {sd_plugin.__version__}\n"


def test_no_arguments_is_a_usage_error(launch):
    done = launch()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


def test_a_subcommand_comes_before_a_program_of_its_name(monkeypatch):
    import sys
    from types import ModuleType

    from sd_plugin import __main__ as launcher

    module = ModuleType("standin_subcommand")
    module.main = lambda argv: len(argv)
    monkeypatch.setitem(sys.modules, "standin_subcommand", module)
    monkeypatch.setitem(launcher.SUBCOMMANDS, "standin", "standin_subcommand")
    assert launcher.main(["standin", "a", "b"]) == 2
