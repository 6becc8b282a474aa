#!/usr/bin/env python
"""Checks command lines against the programs that they are for, without running any.

The input is a JSON list of {"command": [...], "variables": {...}}; each problem is printed in a line. Exit status:
0 all are valid, 1 not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:
    # As a program: its siblings are in the folder above. This one's modules have names that other libraries import.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

Arguments = list[str]


def zaremba(arguments: Arguments) -> None:
    import typer
    import zaremba_main
    from training_settings import read_settings

    parsed = typer.main.get_command(zaremba_main.app).make_context("zaremba_main.py", list(arguments)).params
    given = {key: parsed[key] for key in ("mode", "data", "seed") if parsed[key] is not None}
    read_settings(Path(parsed["config"]), given)


def awd_lstm(arguments: Arguments) -> None:
    import host_launcher
    import ner_main
    from awd_main import CHECKOUT

    parser = host_launcher.parser("awd_main.py", "", CHECKOUT, "--awd-dir")
    _, rest = parser.parse_known_args(arguments)
    ner_main.check_known(rest, CHECKOUT.locate(None, os.environ) / "main.py")


def targer(arguments: Arguments) -> None:
    import ner_main

    options, rest = ner_main.parser().parse_known_args(arguments)
    ner_main.settings_of(options)
    ner_main.check_known(rest, ner_main.CHECKOUT.locate(None, os.environ) / "main.py")


def onmt_train(arguments: Arguments) -> None:
    from onmt.bin.train import _get_parser

    _, unknown = _get_parser().parse_known_args(arguments)
    # The program would ignore them without a word.
    if unknown:
        raise ValueError(f"unknown: {' '.join(unknown)}")


def onmt_build_vocab(arguments: Arguments) -> None:
    from onmt.bin.build_vocab import _get_parser

    _, unknown = _get_parser().parse_known_args(arguments)
    # Those of the training are in the same file.
    if wrong := set(unknown) & set(arguments):
        raise ValueError(f"unknown: {' '.join(wrong)}")


def onmt_translate(arguments: Arguments) -> None:
    from onmt.bin.translate import _get_parser

    _get_parser().parse_args(arguments)


def sacrebleu(arguments: Arguments) -> None:
    from sacrebleu import sacrebleu as program

    sys.argv = ["sacrebleu", *arguments]
    program.parse_args()


PROGRAMS: dict[str, Callable[[Arguments], None]] = {
    "zaremba_main.py": zaremba,
    "dense_baseline.py": zaremba,
    "awd_main.py": awd_lstm,
    "ner_main.py": targer,
    "onmt_train": onmt_train,
    "onmt_build_vocab": onmt_build_vocab,
    "onmt_translate": onmt_translate,
    "sacrebleu": sacrebleu,
}


def problem(command: Arguments) -> str | None:
    """What is wrong with a command, in a line; None if it is valid."""
    at = next(i for i, word in enumerate(command) if Path(word).name in PROGRAMS)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            PROGRAMS[Path(command[at]).name](command[at + 1 :])
    except SystemExit as error:
        if error.code:
            return " ".join(told.getvalue().split())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    status = 0
    for given in json.load(sys.stdin):
        os.environ.update(given["variables"])
        found = problem(given["command"])
        if found is not None:
            print(f"{' '.join(given['command'])}: {found}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
