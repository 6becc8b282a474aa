"""What the launchers of checked-out hosts share: finding the checkout, its data, and running one of its programs."""

import argparse
import builtins
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import interruption
from pydantic import Field
from thread_limits import bound_torch
from user_input import Model, Number, Parser, WholeNumberText, shortened, shown, validated

from sd_plugin._environment import CASES, MODES, TARGETS_VARIABLE, VARIABLE, read_switch
from sd_plugin.errors import UsageError
from sd_plugin.patches._checkout import Checkout, commit_of

REPORT_VARIABLE = "SD_PLUGIN_REPORT"

# What the numbers among a host's own options may be. Other values of these make it stop with a traceback, or never.
Size = Annotated[WholeNumberText, Field(ge=1)]
Count = Annotated[WholeNumberText, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
NotNegative = Annotated[Number, Field(ge=0)]
#: numpy takes no other.
Seed = Annotated[WholeNumberText, Field(ge=0, le=2**32 - 1)]


def parser(program: str, description: str, checkout: Checkout, folder_option: str) -> argparse.ArgumentParser:
    """A parser with the options that every launcher has; what it does not know is the host's.

    argparse, because ``--sd`` may have a value or none.
    """
    made = Parser(
        prog=program,
        description=description,
        usage=f"{program} [--sd[=MODE]] [options] [ARGS of the original ...]",
        epilog="All other arguments are passed on to the original program.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--sd",
        nargs="?",
        const="nr_rh_st",
        metavar="MODE",
        help=f"structured dropout, by mode: {', '.join(MODES)} (default nr_rh_st). Without it, the original program",
    )
    made.add_argument("--sd-case", metavar="CASE", help=f"of the paper's Fig. 1: {', '.join(CASES)} (default III)")
    made.add_argument("--sd-dry-run", action="store_true", help="print what would be patched, and stop")
    made.add_argument(
        folder_option,
        dest="folder",
        type=Path,
        metavar="DIR",
        help=f"a checkout; else {checkout.variable}, the working directory, or a clone in the cache folder",
    )
    return made


def check_choice(name: str, value: str | None, valid: Sequence[str]) -> None:
    """Raise UsageError unless ``value`` is None or one of ``valid``."""
    if value is not None and value not in valid:
        raise UsageError(f"{name} must be one of {', '.join(valid)}, got {shown(value)}")


def check_environment(structured: bool) -> None:
    """Raise UsageError if ``SD_PLUGIN`` and its targets contradict the command line, which would be patched by both."""
    switch = read_switch(os.environ)
    if structured and not switch.enabled:
        raise UsageError(f"--sd, but {VARIABLE}={os.environ[VARIABLE]} switches the plugin off")
    if switch.replaces("torch"):
        raise UsageError(f"{TARGETS_VARIABLE} names torch, which would be patched too: run without {VARIABLE}")


def told_in_one_line(main: Callable[[], int]) -> int:
    """Run ``main``; a mistake of the user's becomes one line and exit status 2, Ctrl-C one line and 130."""
    interruption.is_raised()
    try:
        return main()
    except UsageError as error:
        print(f"error: {shortened(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interruption.is_over()
        print("interrupted", file=sys.stderr)
        return interruption.STATUS


def check_installed(*modules: str) -> None:
    """Raise UsageError if a module cannot be imported, which a host fails without."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            raise UsageError(f"{module} is not installed, which the original needs") from None


def checked_options(schema: type[Model], arguments: Sequence[str], short: Mapping[str, str] | None = None) -> Model:
    """What the host's arguments give to its options in ``schema``, abbreviated or not; other arguments are ignored.

    Args:
        schema: the aliases of its fields are the options.
        short: other names that options have.

    Raises:
        UsageError: a value is not valid, or there is none.
    """
    given = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for option in (str(field.alias) for field in schema.model_fields.values()):
        names = [option, short[option]] if short and option in short else [option]
        given.add_argument(*names, dest=option)
    return validated(schema, vars(given.parse_known_args(list(arguments))[0]))


def tell_dry_run(title: str, folder: Path, settings: str, changes: Sequence[str]) -> None:
    """Print what would be patched."""
    print(f"{title} in {folder}, commit {commit_of(folder)}: {settings}. Would be patched:")
    for change in changes:
        print(f"  {change}")


def run_program(path: Path, arguments: Sequence[str], prepare: Callable[[], None]) -> int:
    """Run a host's program as if by ``python PATH ARGUMENTS``, after ``prepare`` has patched the host.

    ``prepare`` is called when ``__main__`` is the program already, none of whose code has run. The exit status is the
    program's own. Threads are bounded by the number of processors; what that changes is told in one line.
    """
    if note := bound_torch():
        print(f"note: {note}", file=sys.stderr)
    enter_program(path, arguments)
    prepare()
    exec(compile(path.read_bytes(), str(path), "exec"), vars(sys.modules["__main__"]))
    return 0


def enter_program(path: Path, arguments: Sequence[str]) -> None:
    """Make ``__main__``, ``sys.argv`` and ``sys.path`` what they are when Python is started with the program."""
    module = ModuleType("__main__")
    vars(module).update(__file__=str(path), __builtins__=builtins)
    sys.modules["__main__"] = module
    sys.argv = [str(path), *arguments]
    sys.path[0] = str(path.parent)


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """The last value that the host's arguments give to ``--option``, as argparse reads it; None if there is none."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    given.add_argument(option, dest="value")
    try:
        value: str | None = given.parse_known_args(list(arguments))[0].value
    except argparse.ArgumentError:
        raise UsageError(f"{option} needs a value") from None
    return value


def text_folder(folder: Path, names: Mapping[str, str]) -> Path:
    """A folder in which every one of ``names`` is a file, for a host that asks for these names.

    Args:
        folder: where they are, under these names or those that ``scripts/get_data.py`` gives them.
        names: the host's name of a file -> the other name.

    Raises:
        UsageError: a file is missing or empty.
    """
    found = {name: folder / (name if (folder / name).is_file() else other) for name, other in names.items()}
    for name, path in found.items():
        if not path.is_file():
            raise UsageError(f"no training data in {folder}: neither {name} nor {path.name} is there")
        if path.stat().st_size == 0:
            raise UsageError(f"{path} is empty")
    if all(path.name == name for name, path in found.items()):
        return folder
    return _linked(folder, found)


def _linked(folder: Path, files: Mapping[str, Path]) -> Path:
    """A folder of links, always the same one for ``folder``: hosts name their caches by the path they are given."""
    from sd_plugin.kernels import cache_folder, leftovers

    where = str(folder.resolve())
    links = cache_folder.made("corpora", hashlib.sha256(where.encode()).hexdigest()[:16])
    for name, path in files.items():
        fresh = leftovers.partial(links / name)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(path.resolve())
        fresh.replace(links / name)
    return links
