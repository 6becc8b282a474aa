#!/usr/bin/env python
"""Train and evaluate achernodub/targer, unmodified, on CoNLL-2003, with or without structured dropout.

    python scripts/ner_main.py --sd=random --epoch-num 100    # the paper's baseline
    python scripts/ner_main.py --sd=nr_st --epoch-num 100     # the same dropout, structured
    python scripts/ner_main.py --sd --epoch-num 100           # and recurrent dropout
    python scripts/ner_main.py --epoch-num 100                # the original

Without ``--sd`` the original's own dropout is used; only what fails on a modern torch is put right. What the original
writes, F1 and times of each epoch (``epochs.csv``) and the result (``result.json``) go to a folder of their own; the
checkout is only read. The saved model is scored by conlleval, as the original does it, and by seqeval if that is
installed. Exit status: 0 good, 1 the two disagree, 2 wrong use.
"""

import argparse
import ast
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Before all that takes long to import.
import interruption  # noqa: F401

# isort: split
try:
    import pydantic  # noqa: F401

    import sd_plugin  # noqa: F401
except ImportError:
    print("ner_main.py needs sd-plugin and pydantic: pip install '.[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

import host_launcher
import ner_data
import ner_scores
import run_folder
from host_launcher import Count, NotNegative, Seed, Share, Size
from machine_limits import check_fits, memory
from pydantic import BaseModel, ConfigDict, Field
from user_input import WholeNumberText, reason_of
from whole_file import write_whole

from sd_plugin._environment import MODES, VARIABLE, read_switch
from sd_plugin.errors import UsageError
from sd_plugin.patches import targer
from sd_plugin.patches._checkout import commit_of
from sd_plugin.patches._fingerprint import Fingerprint, Function

if TYPE_CHECKING:
    from ner_measurement import Log

#: What this program relies on beyond what the patch replaces: it times or calls these.
_CALLED: dict[str, Fingerprint] = {
    "src/classes/datasets_bank.py": {
        "DatasetsBank.get_train_batches": Function.of("self batch_size"),
        "DatasetsBankSorted.get_train_batches": Function.of("self batch_size"),
    },
    "src/classes/report.py": {"Report.write_epoch_scores": Function.of("self epoch scores")},
    "src/evaluators/evaluator_base.py": {
        "EvaluatorBase.get_evaluation_score_train_dev_test": Function.of("self tagger datasets_bank batch_size"),
    },
    "src/evaluators/evaluator_f1_micro_spans_connl.py": {
        "EvaluatorF1MicroSpansConnl.get_evaluation_score": Function.of(
            "self targets_tag_sequences outputs_tag_sequences word_sequences"
        ),
    },
    "src/data_io/data_io_connl_ner_2003.py": {
        "DataIOConnlNer2003.read_data": Function.of("self fn verbose column_no"),
    },
}
CHECKOUT = replace(targer.CHECKOUT, fingerprints={**targer.CHECKOUT.fingerprints, **_CALLED})

#: What is put into the folder of a run before its first result.
PREPARED = ("conlleval", "random_vectors.txt", "report.txt")

#: The host's options that name files, which are its working directory's; those of the first line must exist.
_FILES = (
    *(("--train",), ("--dev",), ("--test",), ("--emb-fn",), ("--load", "-l")),
    *(("--save", "-s"), ("--report-fn",), ("--word-seq-indexer", "-w")),
)
_MUST_EXIST = ("train", "dev", "test", "emb_fn", "load")
#: The model that the host trains unless told otherwise.
_MODEL = "BiRNNCNNCRF"
#: The file of trained vectors that the host itself looks for.
_GLOVE = Path("embeddings", "glove.6B.100d.txt")


# ---------------------------------------------------------------------------------------- the command line


class Numbers(BaseModel):
    """Options that are numbers, most of them the host's, with the defaults that hold here."""

    model_config = ConfigDict(alias_generator=lambda name: f"--{name.replace('_', '-')}")

    sd_recurrent_dropout: Share | None = None
    gpu: Annotated[WholeNumberText, Field(ge=-1)] = -1
    dropout_ratio: Share = 0.5
    batch_size: Size = 10
    emb_dim: Size = 100
    seed_num: Seed = 42
    epoch_num: Count = 100
    min_epoch_num: Count = 50
    patience: Count = 15
    lr: NotNegative = 0.01
    # The host takes a negative one for none.
    lr_decay: NotNegative = 0.05
    momentum: Share = 0.9
    clip_grad: NotNegative = 5.0
    rnn_hidden_dim: Size = 100
    char_embeddings_dim: Size = 25
    char_cnn_filter_num: Annotated[Size, Field(alias="--char-cnn_filter-num")] = 30
    char_window_size: Size = 3
    word_len: Size = 20

    def parameters(self, words: int) -> int:
        """How many the tagger has at least without characters: of words, and of the BiLSTM, which reads them."""
        return words * self.emb_dim + 8 * self.rnn_hidden_dim * (self.emb_dim + self.rnn_hidden_dim)

    def parameters_of_characters(self) -> int:
        """How many the convolution over the characters of a word has at least, with the BiLSTM, which reads it."""
        features = self.char_embeddings_dim * self.char_cnn_filter_num
        return features * (self.char_window_size + 8 * self.rnn_hidden_dim)


def parser() -> argparse.ArgumentParser:
    """The launcher's options, and those of the host that it has to know."""
    # argparse: typer has no option whose value may be left out, as that of --sd, and the host's own must pass through.
    made = host_launcher.parser("ner_main.py", (__doc__ or "").split("\n\n")[0], CHECKOUT, "--targer-dir")
    made.add_argument("--sd-recurrent-dropout", metavar="P", help="of nr_rh_st (default: as --dropout-ratio)")
    made.add_argument(
        "--data", type=Path, metavar="DIR", help="CoNLL-2003; else the checkout's own, else data/conll2003"
    )
    made.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="where to write (default: a new folder in run, named by the mode)"
    )
    host = made.add_argument_group("options of the original with other defaults, or looked at here")
    for names in _FILES:
        host.add_argument(*names, type=Path, metavar="FILE")
    host.add_argument("--gpu", default="-1", metavar="N", help="-1 (default) for the CPU")
    host.add_argument("--data-io", "-d", default="connl-ner-2003", help=argparse.SUPPRESS)
    host.add_argument("--evaluator", "-v", default="f1-connl", help=argparse.SUPPRESS)
    host.add_argument("--rnn-type", default="LSTM", help=argparse.SUPPRESS)
    host.add_argument("--dropout-ratio", "-r", default="0.5", metavar="P")
    host.add_argument("--batch-size", "-b", default="10", metavar="N")
    host.add_argument("--emb-dim", default="100", metavar="N")
    host.add_argument("--seed-num", default="42", metavar="N")
    return made


#: The host's short names of options that it alone knows of :class:`Numbers`.
_SHORT = {"--epoch-num": "-e", "--min-epoch-num": "-n", "--patience": "-p", "--momentum": "-m"}


def read_numbers(options: argparse.Namespace, rest: Sequence[str]) -> Numbers:
    """The numbers of the command line, which are put into ``options`` where the parser knows them.

    Raises:
        UsageError: one is not valid.
    """
    named = [(name, value) for name, value in vars(options).items() if name in Numbers.model_fields]
    known = [f"--{name.replace('_', '-')}={value}" for name, value in named if value is not None]
    numbers = host_launcher.checked_options(Numbers, [*known, *rest], _SHORT)
    for name, _ in named:
        setattr(options, name, getattr(numbers, name))
    return numbers


def host_options(program: Path) -> set[str]:
    """The options of the host's program, read from its text."""
    calls = (node for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    added = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument")
    given = (argument.value for call in added for argument in call.args if isinstance(argument, ast.Constant))
    return {value for value in given if isinstance(value, str) and value.startswith("-")}


def check_known(arguments: Sequence[str], program: Path) -> None:
    """Raise UsageError for an option that the host's program does not know.

    Abbreviations, which the host would take, are refused too: what one stands for could not be looked at.
    """
    known = host_options(program)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise UsageError(f"unknown option {name}: neither of this program nor of {program}")


def check_options(options: argparse.Namespace, rest: Sequence[str], program: Path) -> None:
    """Refuse what can be known to fail, or to have no effect.

    Raises:
        UsageError: what is wrong, in one line.
    """
    check_known(rest, program)
    for name, value, needed in (
        ("--data-io", options.data_io, "connl-ner-2003"),
        ("--evaluator", options.evaluator, "f1-connl"),
        *((("--rnn-type", options.rnn_type, "LSTM"),) if options.sd else ()),
    ):
        if value != needed:
            raise UsageError(f"{name} {value}: here only {needed}; the original itself takes others: {program}")
    for name in _MUST_EXIST:
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise UsageError(f"--{name.replace('_', '-')}: there is no file {path}")
    for name in ("save", "report_fn", "word_seq_indexer"):
        path = getattr(options, name)
        if path is not None and not os.access(path.resolve().parent, os.W_OK):
            raise UsageError(f"--{name.replace('_', '-')}: {path.resolve().parent} is no folder to write in")
    if options.run_dir is not None and (options.run_dir / "epochs.csv").exists():
        raise UsageError(f"--run-dir: {options.run_dir} holds the results of another run")


def check_sizes(numbers: Numbers, words: int, has_characters: bool) -> None:
    """Refuse a new tagger that no memory holds, or that cannot read a word.

    Args:
        words: different ones in the text; has_characters: the model reads the characters of words, too.

    Raises:
        UsageError: what is wrong, in one line.
    """
    # A gradient for each parameter, and its momentum.
    copies = 12
    sizes = f"--emb-dim {numbers.emb_dim} --rnn-hidden-dim {numbers.rnn_hidden_dim}"
    check_fits(sizes, copies * numbers.parameters(words), memory())
    if not has_characters:
        return
    window, length = numbers.char_window_size, numbers.word_len
    if window > length:
        raise UsageError(f"--char-window-size {window}: a word has {length} characters here; --word-len N makes it N")
    # The number of each character of a word, and its vector.
    check_fits(f"--word-len {length}", length * (8 + 4 * numbers.char_embeddings_dim), memory())
    named = f"--char-embeddings-dim {numbers.char_embeddings_dim} --char-cnn_filter-num {numbers.char_cnn_filter_num}"
    sizes = f"{named} --char-window-size {window} --rnn-hidden-dim {numbers.rnn_hidden_dim}"
    check_fits(sizes, copies * numbers.parameters_of_characters(), memory())


def settings_of(options: argparse.Namespace) -> targer.Settings | None:
    """How units are dropped; None for the original.

    Raises:
        UsageError: an option is not valid, or has no effect without ``--sd``.
    """
    host_launcher.check_environment(options.sd is not None)
    host_launcher.check_choice("--sd", options.sd, MODES)
    if options.sd is not None:
        return targer.Settings.of(options.sd, options.sd_case, options.sd_recurrent_dropout)
    for name, value in (("--sd-case", options.sd_case), ("--sd-recurrent-dropout", options.sd_recurrent_dropout)):
        if value is not None:
            raise UsageError(f"{name} has no effect without --sd")
    if read_switch(os.environ).replace:
        warn(f"{VARIABLE}={os.environ[VARIABLE]} has no effect here: without --sd this is the original")
    return None


def check_machine(options: argparse.Namespace) -> None:
    """Raise UsageError where something is missing that the host fails without, only later."""
    if shutil.which("perl") is None:
        raise UsageError("no perl is installed: the original scores with the Perl script conlleval")
    host_launcher.check_installed("numpy")
    if options.gpu >= 0:
        import torch

        if options.gpu >= torch.cuda.device_count():
            raise UsageError(f"--gpu {options.gpu}: torch sees {torch.cuda.device_count()} GPUs here")


def warn(text: str) -> None:
    """Print what is no result."""
    print(f"ner_main.py: {text}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ one run


@dataclass
class Run:
    """One training, or evaluation of a loaded model.

    Attributes:
        settings: how units are dropped; None for the original.
        checkout: the host's folder; path: the run's own, the working directory of the host.
        options: of the command line; rest: arguments of it that are the host's alone.
        files: the text, by part.
        vectors: where the word vectors come from, in words.
    """

    settings: targer.Settings | None
    checkout: Path
    path: Path
    options: argparse.Namespace
    rest: list[str]
    files: dict[str, Path]
    vectors: str = ""

    @property
    def saved(self) -> Path:
        """The host's checkpoint."""
        return (self.options.save or self.path / "tagger.hdf5").resolve()

    def prepare(self) -> list[str]:
        """Fill the folder of the run, and make the host's arguments.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            # The host calls it in its working directory.
            shutil.copyfile(self.checkout / "conlleval", self.path / "conlleval")
            vectors = self._word_vectors()
        except OSError as error:
            raise UsageError(f"{error.filename or self.path}: {error.strerror or error}") from error
        options = self.options
        named: dict[str, Any] = {
            **self.files,
            "emb-fn": vectors,
            "save": self.saved,
            "report-fn": (options.report_fn or self.path / "report.txt").resolve(),
            "load": options.load and options.load.resolve(),
            "word-seq-indexer": options.word_seq_indexer and options.word_seq_indexer.resolve(),
        }
        for name in ("gpu", "rnn_type", "dropout_ratio", "batch_size", "emb_dim", "seed_num"):
            named[name.replace("_", "-")] = getattr(options, name)
        return [*self.rest, *(f"--{name}={value}" for name, value in named.items() if value is not None)]

    def _word_vectors(self) -> Path:
        """Trained vectors if there are any, else random ones, made now."""
        options = self.options
        glove = self.checkout / _GLOVE
        given = options.emb_fn or (glove if glove.is_file() and options.emb_dim == 100 else None)
        if given is not None:
            self.vectors = str(given)
            return given.resolve()
        made = self.path / "random_vectors.txt"
        count = ner_data.write_vectors(self.files, made, options.emb_dim, options.seed_num)
        self.vectors = f"random, uniform in ±sqrt(3/{options.emb_dim}), seed {options.seed_num}, {count} words"
        warn(f"no {_GLOVE} in the checkout, so words get random vectors ({self.vectors}; as Ma and Hovy 2016 do for")
        warn("words without one): F1 will be lower than the paper's. --emb-fn FILE names trained ones")
        return made

    def patch(self) -> None:
        """Patch the host, as asked."""
        if self.settings is None:
            targer.patch_files(self.checkout)
        else:
            targer.enable(self.settings.mode, self.settings.case, self.settings.recurrent_dropout)

    def finish(self, log: "Log") -> int:
        """Score the saved model, tell and write the result; the exit status."""
        from sd_plugin import stats

        scores = self._scores() if self.saved.is_file() else {}
        result = {
            "mode": "original" if self.settings is None else self.settings.mode,
            "settings": None if self.settings is None else asdict(self.settings),
            "dropout_ratio": self.options.dropout_ratio,
            "seed": self.options.seed_num,
            "vectors": self.vectors,
            "files": {part: str(path) for part, path in self.files.items()},
            "arguments": sys.argv[1:],
            "saved": str(self.saved),
            "scores": {part: asdict(score) for part, score in scores.items()},
            "epochs": [asdict(row) for row in log.rows],
            "report": stats.lines(),
            **self._machine(),
        }
        write_whole(self.path / "result.json", json.dumps(result, indent=1) + "\n")
        print(f"\n{self.settings or 'the original'}; seed {self.options.seed_num}; vectors: {self.vectors}")
        for part, score in scores.items():
            print(f"F1 of the saved model on {part}: {score}")
        print(log.summary())
        if self.settings is not None:
            # Random dropout skips nothing, so that there is nothing to report.
            print(stats.report() if stats.sites() else "no product could skip anything")
        print(f"{self.path} holds {', '.join(sorted(path.name for path in self.path.iterdir()))}")
        if all(score.agrees for score in scores.values()):
            return 0
        warn("conlleval and seqeval disagree")
        return 1

    def _scores(self) -> dict[str, ner_scores.Score]:
        from src.factories.factory_tagger import TaggerFactory

        tagger = TaggerFactory.load(str(self.saved), self.options.gpu)
        return {part: ner_scores.score(tagger, self.files[part]) for part in ("dev", "test")}

    def _machine(self) -> dict[str, Any]:
        import torch

        import sd_plugin

        return {
            "device": "cpu" if self.options.gpu < 0 else torch.cuda.get_device_name(self.options.gpu),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sd_plugin": sd_plugin.__version__,
            "targer": commit_of(self.checkout),
        }


def plan(
    options: argparse.Namespace, numbers: Numbers, rest: list[str], settings: targer.Settings | None, checkout: Path
) -> Run:
    """A run whose every input has been looked at; nothing is written yet.

    Raises:
        UsageError: something is missing or wrong.
    """
    check_options(options, rest, checkout / "main.py")
    check_machine(options)
    given = {part: getattr(options, part).resolve() for part in ner_data.PARTS if getattr(options, part) is not None}
    files = given if len(given) == len(ner_data.PARTS) else {**ner_data.find(options.data, checkout), **given}
    counts = {part: ner_data.count_sentences(path) for part, path in files.items()}
    for part, count in counts.items():
        needed = options.batch_size if part == "train" else 1
        if count < needed:
            raise UsageError(f"{files[part]} has {count} sentences, and needs {needed} at least")
    if options.load is None:
        model = host_launcher.value_of(rest, "--model") or _MODEL
        check_sizes(numbers, len(ner_data.words(files.values())), "CNN" in model)
        if numbers.epoch_num == 0:
            raise UsageError("--epoch-num 0 trains nothing: it is for a saved tagger, to be evaluated: add --load FILE")
    label = settings.mode if settings else "original"
    path = options.run_dir or Path("run", f"ner_{label}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    return Run(settings, checkout, path.resolve(), options, rest, files)


def main() -> int:
    """Parse the command line and run the host; the exit status."""
    options, rest = parser().parse_known_args()
    numbers = read_numbers(options, rest)
    settings = settings_of(options)
    checkout = CHECKOUT.locate(options.folder, os.environ)
    # Nothing may be written into the checkout, compiled modules included.
    sys.dont_write_bytecode = True
    # What is asked for here holds; the start-up hook would go by this.
    os.environ[VARIABLE] = "0" if settings is None else settings.mode
    program = checkout / "main.py"
    if options.sd_dry_run:
        host_launcher.check_installed("numpy")
        host_launcher.enter_program(program, rest)
        Run(settings, checkout, Path(), options, rest, {}).patch()
        host_launcher.tell_dry_run("targer", checkout, str(settings or "the original"), targer.changes())
        return 0
    run = plan(options, numbers, rest, settings, checkout)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_folder.held(run.path, PREPARED))
        except OSError as error:
            raise UsageError(reason_of(error)) from None
        return train(run, program)


def train(run: Run, program: Path) -> int:
    """Run the host in its folder, and score what it saves; the exit status."""
    arguments = run.prepare()
    os.chdir(run.path)
    from ner_measurement import Log

    log = Log(run.path / "epochs.csv")

    def patch() -> None:
        run.patch()
        log.attach()

    status = host_launcher.run_program(program, arguments, patch)
    return status or run.finish(log)


if __name__ == "__main__":
    # The host numbers characters in the order of a set of them: with another order, the same seed is another start.
    if "PYTHONHASHSEED" not in os.environ:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(host_launcher.told_in_one_line(main))
