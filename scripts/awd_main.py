#!/usr/bin/env python
"""Run salesforce/awd-lstm-lm, unmodified, with or without structured dropout.

    python scripts/awd_main.py --sd --data data/ptb --batch_size 20 --epochs 100 --save PTB.pt
    python scripts/awd_main.py --data data/ptb --batch_size 20 --epochs 100 --save baseline.pt
    python scripts/awd_main.py --script generate --checkpoint PTB.pt --data data/ptb

Without ``--sd`` the original trains with its own dropout; only what fails on a modern torch is put right. The counters
of what was dropped and skipped are printed at the end (``SD_PLUGIN_REPORT=0``: not). Exit status: the program's own;
2 for wrong use.
"""

import os
import sys
from pathlib import Path

import host_launcher
from host_launcher import UsageError

from sd_plugin._environment import CASES, MODES
from sd_plugin.patches import awd_lstm
from sd_plugin.patches.awd_lstm import CHECKOUT

SCRIPTS = ("main", "finetune", "generate", "pointer")
#: The file that each program reads a trained model from: its option, and the program's default.
MODELS = {"finetune": ("--save", None), "generate": ("--checkpoint", "model.pt"), "pointer": ("--save", "best.pt")}
#: The host's options that name files.
FILE_OPTIONS = ("--data", "--save", "--resume", "--checkpoint", "--outf")
#: The host's file names -> those of scripts/get_data.py.
CORPUS = {f"{part}.txt": f"ptb.{part}.txt" for part in ("train", "valid", "test")}


def main() -> int:
    """Parse the command line and run the program; its exit status."""
    parser = host_launcher.parser("awd_main.py", (__doc__ or "").split("\n\n")[0], CHECKOUT, "--awd-dir")
    parser.add_argument("--script", default="main", metavar="NAME", help=f"{', '.join(SCRIPTS)} (default main)")
    options, arguments = parser.parse_known_args()
    host_launcher.check_environment(options.sd is not None)
    host_launcher.check_choice("--sd", options.sd, MODES)
    host_launcher.check_choice("--sd-case", options.sd_case, CASES)
    host_launcher.check_choice("--script", options.script, SCRIPTS)
    folder = CHECKOUT.locate(options.folder, os.environ)
    program = folder / f"{options.script}.py"
    if not program.is_file():
        raise UsageError(f"{folder} has no {program.name}")
    mode = options.sd or "random"
    if options.sd_dry_run:
        host_launcher.enter_program(program, arguments)
        awd_lstm.enable(mode, options.sd_case, folder=folder)
        settings = "mode random, the host's own dropout" if mode == "random" else f"mode {mode}"
        host_launcher.tell_dry_run("awd-lstm-lm", folder, settings, awd_lstm.changes())
        return 0
    arguments = complete(options.script, arguments, folder)
    if options.sd:
        os.environ.setdefault(host_launcher.REPORT_VARIABLE, "1")
    return host_launcher.run_program(program, arguments, lambda: awd_lstm.enable(mode, options.sd_case, folder=folder))


def complete(script: str, arguments: list[str], folder: Path) -> list[str]:
    """The host's arguments with its data found, after a look at what would fail only later.

    Raises:
        UsageError: data or a model are missing, or the folder to save in; or one of them is named by an abbreviation,
            which the host would take, and this program not see.
    """
    for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        whole = next((option for option in FILE_OPTIONS if option != name and option.startswith(name)), None)
        if whole is not None:
            raise UsageError(f"{name}: write {whole} in full")
    arguments = [*arguments, "--data", str(find_data(arguments, folder))]
    if script in MODELS:
        option, default = MODELS[script]
        model = host_launcher.value_of(arguments, option) or default
        if model is None or not Path(model).is_file():
            told = "none was named" if model is None else f"there is no {model}"
            raise UsageError(f"{script}.py works on a model that main.py has saved, but {told}: give {option} FILE")
    check_files(script, arguments)
    if script != "generate" and "--cuda" not in arguments and not has_gpu():
        # The host's flag is the wrong way round: it switches CUDA off.
        print("awd_main.py: no GPU here: adding --cuda, which is how this host is told not to use one", file=sys.stderr)
        arguments.append("--cuda")
    return arguments


def find_data(arguments: list[str], folder: Path) -> Path:
    """The folder of the corpus: what is named, else the host's default here, or in its checkout."""
    named = host_launcher.value_of(arguments, "--data")
    places = [Path(named)] if named else [Path("data", "penn"), folder / "data" / "penn", Path("data", "ptb")]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        where = " and ".join(str(place) for place in places)
        raise UsageError(f"no training data: looked in {where}; python scripts/get_data.py ptb makes data/ptb")
    return host_launcher.text_folder(found, CORPUS)


def check_files(script: str, arguments: list[str]) -> None:
    """Refuse now what would fail after an epoch of training."""
    if script == "main":
        resumed = host_launcher.value_of(arguments, "--resume")
        if resumed and not Path(resumed).is_file():
            raise UsageError(f"--resume: there is no {resumed}")
    written = host_launcher.value_of(arguments, "--outf" if script == "generate" else "--save")
    if not written or script == "pointer":
        return
    if not os.access(Path(written).absolute().parent, os.W_OK):
        raise UsageError(f"{written}: {Path(written).absolute().parent} is no folder to write in")
    if Path(written).is_dir():
        raise UsageError(f"{written} is a folder, not a file to write")


def has_gpu() -> bool:
    """torch can use one."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(host_launcher.told_in_one_line(main))
