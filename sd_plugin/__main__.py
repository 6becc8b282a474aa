"""Runs a program with the start-up hook installed: `python -m sd_plugin PROGRAM [ARGS...]`.

For environments in which start-up files are not read (`pip install --target`, `python -S`), and for scripts
that should not depend on them. Only the process itself gets the hook this way: child processes started by
`spawn` or `subprocess` have their own start-up, and get it from the start-up files alone.

Standard library only: the program decides what else is loaded, and when.
"""

import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from sd_plugin import __version__, _autoload
from sd_plugin.errors import UsageError

# Sub-command -> module with `main(argv) -> int | None`, where argv excludes the sub-command's name.
SUBCOMMANDS: dict[str, str] = {
    "bench": "sd_plugin.bench.command",
    "doctor": "sd_plugin.doctor",
    "to-stock": "sd_plugin.opennmt.to_stock",
}

USAGE = "usage: python -m sd_plugin [--help] [--version] PROGRAM [ARGS...]"
EXAMPLE = "python -m sd_plugin onmt_train -config run.yaml"
HELP = f"""{USAGE}

Runs PROGRAM in this Python, with sd-plugin's hook into the hosts it knows. PROGRAM is
  - a script: path/to/main.py
  - a module: -m package.module
  - an installed command: onmt_train

Example: {EXAMPLE}

Or one of its own commands (each has a --help):
  doctor    list the hosts found, patched or not and why, backends and settings
  bench     time training steps: stock, and with this plugin's dropouts
  to-stock  make a checkpoint of sd_rnn or sd_brnn one that OpenNMT-py reads without this plugin

The environment variable SD_PLUGIN says what the hook may do: 0 nothing; unset: add new names to the hosts;
1: replace the hosts' dropout too, or one of random, nr_st, nr_rh_st to say by which mode. SD_PLUGIN_TARGETS names the
hosts it speaks of; all but torch (any program on torch.nn) otherwise.

An installed sd-plugin hooks itself into every Python of its environment, and this command is not needed. It
is where start-up files are not read: after `pip install --target`, and under `python -S`. Child processes
that the program starts by spawning are hooked by the start-up files only.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what `argv` names (`sys.argv[1:]` if None) and returns an exit code.

    Raises:
        SystemExit: the program's own. Its other exceptions pass through too, except `UsageError`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args:
        print(USAGE, file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        print(f"sd-plugin {__version__}")
        return 0
    try:
        if args[0] in SUBCOMMANDS:
            return importlib.import_module(SUBCOMMANDS[args[0]]).main(args[1:]) or 0
        return _run_program(args)
    except UsageError as error:
        print(f"sd-plugin: error: {error}", file=sys.stderr)
        return 2


def _run_program(args: list[str]) -> int:
    program, rest = args[0], args[1:]
    if importlib.util.find_spec("sd_plugin.patches") is None:
        # The folder of that name in a clone lies in front of an installed package when it is the working directory.
        folder = os.path.dirname(os.path.abspath(__file__))
        raise UsageError(f"{folder} is source code, not an installed sd-plugin: pip install it, or run elsewhere")
    _autoload.install()
    if program == "-m":
        if not rest:
            raise UsageError("-m needs the name of a module; example: python -m sd_plugin -m onmt.bin.train")
        return _run_module(rest[0], rest[1:])
    if program.startswith("-"):
        raise UsageError(f"unknown option {program}; {USAGE}")
    if program.endswith(".py") and os.path.isfile(program):
        return _run_script(program, rest)
    return _run_command(program, rest)


def _run_script(path: str, args: list[str]) -> int:
    sys.argv = [path, *args]
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    runpy.run_path(path, run_name="__main__")
    return 0


def _run_module(name: str, args: list[str]) -> int:
    _set_first_path(os.getcwd())
    if not _is_runnable(name):
        raise UsageError(f"no module {name!r} to run was found on sys.path; example: {EXAMPLE}")
    sys.argv = [name, *args]  # runpy puts the module's file in the first place
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def _is_runnable(name: str) -> bool:
    """Tells a missing module from one that fails while it is imported: that error is the program's own."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return False
        raise
    return spec is not None


def _run_command(name: str, args: list[str]) -> int:
    import sysconfig
    from importlib.metadata import entry_points

    found = tuple(entry_points(group="console_scripts", name=name))
    if not found:
        raise UsageError(f"found neither a Python script nor an installed command called {name!r}; example: {EXAMPLE}")
    # A command started by the shell has its own folder in front of sys.path, not the working directory.
    folder = sysconfig.get_path("scripts")
    sys.argv = [os.path.join(folder, name), *args]
    _set_first_path(folder)
    sys.exit(found[0].load()())


def _set_first_path(folder: str) -> None:
    """Replaces what Python put in front of sys.path for this launcher by what the program would have got."""
    # With -I or -P Python puts nothing there, for the program neither.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = folder


if __name__ == "__main__":
    sys.exit(main())
