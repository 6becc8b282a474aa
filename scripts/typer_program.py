"""Runs a typer program so that what is wrong with its command line is told in one line, not in typer's four.

Imports nothing but the standard library and typer: get_data.py runs without this package and without pydantic, and the
programs in benchmarks/ take what their extras install.
"""

import sys
from typing import Any, NoReturn

import interruption

#: Longest line that a message shows whole, and longest of those that quote what was given.
LINE_LENGTH, QUOTING_LENGTH = 600, 300


def shortened(text: str, length: int = LINE_LENGTH) -> str:
    """``text`` with control characters written out, its middle left out if it is longer than ``length``."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 5]} ... {text[-end:]}"


def in_one_line(text: str, length: int = LINE_LENGTH) -> str:
    """A message of another program's, shortened; its lines are joined."""
    return shortened(" ".join(text.split()), length)


def run_app(app: Any, name: str) -> NoReturn:
    """Run a typer program and exit; what typer finds wrong with a command line is told in one line."""
    from typer.main import get_command

    try:
        status = get_command(app).main(prog_name=name, standalone_mode=False)
    except Exception as error:
        # Whichever classes this version of typer has for them.
        if type(error).__name__ == "Abort":
            print("interrupted", file=sys.stderr)
            sys.exit(interruption.STATUS)
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {in_one_line(error.format_message(), QUOTING_LENGTH)}", file=sys.stderr)
        status = 2
    sys.exit(status)
