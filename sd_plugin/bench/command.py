"""The sub-command ``sd-plugin bench``: makes sure of what it needs before anything else is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .._environment import TARGETS_VARIABLE, VARIABLE, read_switch
from ..errors import UsageError

EXTRA = "sd-plugin bench needs typer and rich: pip install 'sd-plugin[bench]'"


def main(argv: Sequence[str]) -> int:
    """Run it; its exit code.

    Raises:
        UsageError: an argument is not valid, or what it needs is not installed.
    """
    if read_switch(os.environ).replaces("torch"):
        raise UsageError(f"{TARGETS_VARIABLE} names torch, and {VARIABLE} would patch the stock column: unset it")
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(EXTRA) from None
    from .cli import run

    return run(argv)
