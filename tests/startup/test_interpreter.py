"""The start-up hook and the interpreter: what it loads, and that nothing wrong with it breaks Python."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest

from sd_plugin._environment import MODES

from ..patience import PATIENCE
from .conftest import clean_environ

ALIVE = "print('alive')"
HOOKED = """
import sys
print(any(type(finder).__name__ == "HostFinder" for finder in sys.meta_path))
"""


def break_with_syntax_error(site):
    (site / "sd_plugin" / "__init__.py").write_text("def broken(:\n")


def break_with_exception(site):
    (site / "sd_plugin" / "__init__.py").write_text("raise RuntimeError('first line\\nsecond line')\n")


def break_with_interrupt(site):
    (site / "sd_plugin" / "_autoload.py").write_text("raise KeyboardInterrupt\n")


def break_with_interrupt_in_the_function(site):
    code = "def ask():\n  raise KeyboardInterrupt('no')\ndef install():\n  try:\n    ask()\n  finally:\n    1\n"
    (site / "sd_plugin" / "_autoload.py").write_text(code)


def break_with_an_exception_of_its_own_kind(site):
    (site / "sd_plugin" / "_autoload.py").write_text("class Stop(BaseException): ...\nraise Stop('here')\n")


def break_with_an_exception_that_cannot_be_told(site):
    code = "class Stop(BaseException):\n    def __str__(self): raise KeyboardInterrupt\nraise Stop\n"
    (site / "sd_plugin" / "_autoload.py").write_text(code)


def break_with_recursion(site):
    (site / "sd_plugin" / "_autoload.py").write_text("def install(): install()\n")


def break_with_too_little_memory(site):
    (site / "sd_plugin" / "_autoload.py").write_text("raise MemoryError\n")


def break_by_cutting_the_file(site):
    path = site / "sd_plugin" / "_autoload.py"
    path.write_bytes(path.read_bytes()[:3000] + bytes(100))


def break_with_exit(site):
    (site / "sd_plugin" / "_autoload.py").write_text("raise SystemExit(3)\n")


def break_by_removing_the_function(site):
    (site / "sd_plugin" / "_autoload.py").write_text("")


def break_by_raising_in_the_function(site):
    (site / "sd_plugin" / "_autoload.py").write_text("def install():\n    1 / 0\n")


def break_by_a_missing_dependency(site):
    (site / "sd_plugin" / "_autoload.py").write_text("import no_such_module\n")


@pytest.mark.parametrize(
    "break_it",
    [
        break_with_syntax_error,
        break_with_exception,
        break_with_exit,
        break_with_interrupt,
        break_with_interrupt_in_the_function,
        break_with_an_exception_of_its_own_kind,
        break_with_recursion,
        break_with_too_little_memory,
        break_by_cutting_the_file,
        break_by_removing_the_function,
        break_by_raising_in_the_function,
        break_by_a_missing_dependency,
    ],
)
def test_a_broken_package_is_one_line_on_stderr(installed, break_it):
    break_it(installed.site)
    done = installed.run("-c", ALIVE)
    assert (done.returncode, done.stdout) == (0, "alive\n")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("sd-plugin: start-up hook not loaded: ")


def test_an_exception_that_cannot_be_told_does_no_harm(installed):
    break_with_an_exception_that_cannot_be_told(installed.site)
    done = installed.run("-c", ALIVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_half_a_package_is_one_line(installed):
    (installed.site / "sd_plugin" / "_environment.py").unlink()
    done = installed.run("-c", ALIVE, SD_PLUGIN="1")
    assert (done.returncode, done.stdout) == (0, "alive\n")
    assert done.stderr == (
        "sd-plugin: start-up hook not loaded: ModuleNotFoundError: No module named 'sd_plugin._environment'\n"
    )


@pytest.mark.parametrize("work", ["import time\ntime.sleep(60)", "while True:\n    pass"])
def test_the_users_interrupt_ends_python_as_without_the_plugin(installed, bare, work):
    """It is not an exception of the package, though its code may be what is running."""
    begun = 'import sys\nprint("begun", flush=True)\n'
    (installed.site / "sd_plugin" / "_autoload.py").write_text(f"{begun}{work}\n")
    bare.write("slow.py", f"{begun}{work}\n")
    bare.write("slow.pth", "import slow\n")
    ends = []
    for environment in (installed, bare):
        command = [environment.python, "-c", ALIVE]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A shell may start its background jobs with SIGINT ignored.
        restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
        with subprocess.Popen(command, env=clean_environ(), **pipes, **restored) as process:
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGINT)
            out, told = process.communicate(timeout=PATIENCE)
        assert "alive" not in out
        ends.append((process.returncode, told.splitlines()[-1]))
    assert ends[0] == ends[1]
    assert ends[0][0] != 0
    assert ends[0][1] == "KeyboardInterrupt"


def test_a_package_that_is_gone_is_not_missed(installed):
    shutil.rmtree(installed.site / "sd_plugin")
    done = installed.run("-c", ALIVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_an_empty_package_folder_is_not_missed(installed):
    shutil.rmtree(installed.site / "sd_plugin")
    (installed.site / "sd_plugin" / "__pycache__").mkdir(parents=True)
    done = installed.run("-c", ALIVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("state", ["broken", "misconfigured"])
def test_an_unusable_stderr_does_no_harm(installed, redirection, state):
    if state == "broken":
        break_with_exception(installed.site)
    done = subprocess.run(
        ["sh", "-c", f'SD_PLUGIN=bogus "{installed.python}" -c "{ALIVE}" {redirection}'],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == "alive\n"


def test_startup_loads_only_itself(installed, bare):
    bare.write("another.pth", "import sys")  # reading any .pth file may load a codec
    show = "import sys; print(*sorted(sys.modules))"
    with_plugin = set(installed.script(show).stdout.split())
    without = set(bare.script(show).stdout.split())
    assert with_plugin - without == {"sd_plugin", "sd_plugin._autoload"}


@pytest.mark.parametrize("value", [None, "", "1", "on", "TRUE", *MODES])
def test_the_hook_is_installed_silently(installed, value):
    environ = {} if value is None else {"SD_PLUGIN": value}
    done = installed.script(HOOKED, **environ)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("value", ["0", "off", "False", "NO"])
def test_it_can_be_switched_off(installed, value):
    done = installed.script(HOOKED, SD_PLUGIN=value)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_an_unknown_value_is_one_line_and_reads_as_unset(installed):
    done = installed.script(HOOKED, SD_PLUGIN="nr-st")
    assert done.stdout == "True\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("sd-plugin: SD_PLUGIN='nr-st' ")
    assert all(mode in line for mode in MODES)


def test_an_unknown_value_is_told_once_however_often_the_hook_is_installed(installed):
    done = installed.script(
        "from sd_plugin import _autoload; _autoload.install(); _autoload.install()", SD_PLUGIN="bogus"
    )
    assert len(done.stderr.splitlines()) == 1
