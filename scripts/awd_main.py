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
from typing import Annotated, Literal

# Before all that takes long to import.
import interruption  # noqa: F401

# isort: split
try:
    import pydantic  # noqa: F401

    import sd_plugin  # noqa: F401
except ImportError:
    print("awd_main.py needs sd-plugin and pydantic: pip install '.[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

import host_launcher
from host_launcher import Count, NotNegative, Seed, Share, Size, UsageError
from machine_limits import check_fits, memory
from pydantic import BaseModel, ConfigDict, Field
from user_input import Number, WholeNumberText

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


class Training(BaseModel):
    """Options of main.py and finetune.py with the host's defaults."""

    model_config = ConfigDict(alias_generator=lambda name: f"--{name}")

    model: Literal["LSTM", "QRNN", "GRU"] = "LSTM"
    optimizer: Literal["sgd", "adam"] = "sgd"
    emsize: Size = 400
    nhid: Size = 1150
    nlayers: Size = 3
    batch_size: Size = 80
    bptt: Size = 70
    nonmono: Size = 5
    log_interval: Annotated[Size, Field(alias="--log-interval")] = 200
    # After its last epoch it loads what the best one has saved.
    epochs: Size = 8000
    lr: NotNegative = 30.0
    wdecay: NotNegative = 1.2e-6
    clip: NotNegative = 0.25
    alpha: Number = 2.0
    beta: Number = 1.0
    dropout: Share = 0.4
    dropouth: Share = 0.3
    dropouti: Share = 0.65
    dropoute: Share = 0.1
    wdrop: Annotated[Number, Field(ge=0, le=1)] = 0.5
    seed: Seed = 1111

    def parameters(self) -> int:
        """How many the recurrent layers and their gradients have at least: those of the LSTM, which has the most."""
        first, last = 4 * self.nhid * (self.emsize + self.nhid), 4 * self.emsize * (self.nhid + self.emsize)
        if self.nlayers == 1:
            return 4 * self.emsize * 2 * self.emsize
        return first + last + (self.nlayers - 2) * 8 * self.nhid * self.nhid


class Generation(BaseModel):
    """Options of generate.py."""

    model_config = Training.model_config

    words: Count = 1000
    temperature: Number = 1.0
    log_interval: Annotated[Size, Field(alias="--log-interval")] = 100
    seed: WholeNumberText = 1111


class Pointing(BaseModel):
    """Options of pointer.py."""

    model_config = Training.model_config

    bptt: Size = 5000
    window: Size = 3785
    theta: Number = 0.66
    lambdasm: Number = 0.13


#: Program -> the options of it that are looked at.
SCHEMAS: dict[str, type[BaseModel]] = {
    "main": Training,
    "finetune": Training,
    "generate": Generation,
    "pointer": Pointing,
}


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
        host_launcher.check_installed("numpy")
        host_launcher.enter_program(program, arguments)
        awd_lstm.enable(mode, options.sd_case, folder=folder)
        settings = "mode random, the host's own dropout" if mode == "random" else f"mode {mode}"
        host_launcher.tell_dry_run("awd-lstm-lm", folder, settings, awd_lstm.changes())
        return 0
    arguments = complete(options.script, arguments, folder)
    host_launcher.check_installed("numpy")
    if options.sd:
        os.environ.setdefault(host_launcher.REPORT_VARIABLE, "1")
    return host_launcher.run_program(program, arguments, lambda: awd_lstm.enable(mode, options.sd_case, folder=folder))


def complete(script: str, arguments: list[str], folder: Path) -> list[str]:
    """The host's arguments with its data found, after a look at what would fail only later.

    Raises:
        UsageError: data or a model are missing, or the folder to save in; or one of them is named by an abbreviation,
            which the host would take, and this program not see; a number is one that the host would not survive.
    """
    for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        whole = next((option for option in FILE_OPTIONS if option != name and option.startswith(name)), None)
        if whole is not None:
            raise UsageError(f"{name}: write {whole} in full")
    checked = host_launcher.checked_options(SCHEMAS[script], arguments)
    data = find_data(arguments, folder)
    if isinstance(checked, Training):
        check_sizes(checked, data)
    arguments = [*arguments, "--data", str(data)]
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


def check_sizes(options: Training, data: Path) -> None:
    """Raise UsageError for a model that no memory holds, or for a text too short for the columns it is read in."""
    needed = 8 * options.parameters()
    check_fits(f"--emsize {options.emsize} --nhid {options.nhid} --nlayers {options.nlayers}", needed, memory())
    # The host reads the others in as many columns.
    for part, columns in (("train", options.batch_size), ("valid", 10), ("test", 1)):
        # A sequence has a word to predict.
        if not _has_words(data / f"{part}.txt", 2 * columns):
            raise UsageError(f"{data / part}.txt has too few words to be read in {columns} columns")


def _has_words(path: Path, count: int) -> bool:
    """Whether a text has so many words, the ends of its lines counted; it is read no further."""
    # Each has a letter and a space or an end of line.
    if path.stat().st_size < count:
        return False
    found = 0
    with path.open("rb") as lines:
        for line in lines:
            found += len(line.split()) + 1
            if found >= count:
                return True
    return False


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
