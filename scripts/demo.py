#!/usr/bin/env python
"""Train a small translator with structured dropout on a CPU, translate numbers it never saw, show how it did.

Makes the demo corpus (see number_words.py), then runs OpenNMT-py's own programs on ``configs/demo_sd.yaml``:
onmt_build_vocab, onmt_train, onmt_translate. Prints the BLEU of the held-out numbers, a few translations, and
the plugin's report of what was dropped and skipped. ``--stock`` does the same with ``configs/demo.yaml``,
where nothing of the plugin takes part. Takes some minutes on two cores.

Exit status: 0 good, 1 a stage failed or BLEU is below ``--min-bleu``, 2 wrong use.
"""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

# Before all that takes long to import.
import interruption

# isort: split
try:
    import typer
    import yaml
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError:
    print("demo.py needs typer, rich and PyYAML: pip install '.[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

import get_data
from corpus_files import DataError
from thread_limits import bounded
from typer_program import run_app

ROOT = Path(__file__).resolve().parent.parent
#: First words of the report that the plugin writes to the training log.
REPORT_TITLE = "sd-plugin: structured dropout report"
#: Every line that OpenNMT-py's logger begins looks so; the others continue a message of several lines.
_LOG_PREFIX = re.compile(r"^\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+\] ")
_STEP = re.compile(r"Step (\d+)/ *\d+; acc: *([\d.]+)")
#: Lines of a failed program's output that are shown.
_TAIL = 15

_out = Console(highlight=False, markup=False, emoji=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


class DemoError(Exception):
    """Why the demo stopped; the first line says it, further ones may quote a program."""


@dataclass(frozen=True)
class Files:
    """The files of one run, all below the repository.

    Attributes:
        config: the OpenNMT-py configuration.
        settings: its contents.
    """

    config: Path
    settings: dict[str, Any]

    @classmethod
    def of(cls, name: str) -> "Files":
        """Read ``configs/name.yaml``."""
        config = ROOT / "configs" / f"{name}.yaml"
        return cls(config, yaml.safe_load(config.read_text(encoding="utf-8")))

    @property
    def log(self) -> Path:
        """What onmt_train says. OpenNMT-py's own ``log_file`` ends when it opens the corpus, so we keep it here."""
        return self.model.with_name("train.log")

    @property
    def model(self) -> Path:
        """The checkpoint of the last step."""
        return ROOT / f"{self.settings['save_model']}_step_{self.settings['train_steps']}.pt"

    @property
    def hypotheses(self) -> Path:
        """The translations of the held-out numbers."""
        return self.model.with_name("test.hyp")


def environment(stock: bool) -> dict[str, str]:
    """The environment of OpenNMT-py's programs."""
    variables = {**os.environ, **bounded(os.environ)}
    # More threads than idle cores slow small matrix products down several times: as many as are idle, up to two.
    idle = (os.cpu_count() or 1) - round(os.getloadavg()[0])
    variables.setdefault("OMP_NUM_THREADS", str(min(2, max(1, idle))))
    # Should other programs want the cores later, waiting threads must not spin: it costs them both (measured: half).
    variables.setdefault("OMP_WAIT_POLICY", "passive")
    if stock:
        variables["SD_PLUGIN"] = "0"
        # OpenNMT-py 3.5.1 does not know torch's strict loading of checkpoints; this one is our own.
        variables["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return variables


def run(program: str, *arguments: object, stock: bool, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run a console script that is installed beside this Python.

    Args:
        program: its name.
        arguments: its arguments.
        stock: see :func:`environment`.
        on_line: called with every line that it prints.

    Raises:
        DemoError: it is not installed, or it fails; the end of its output is quoted.
    """
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        raise DemoError(f"{program} is not installed beside {sys.executable}; OpenNMT-py is needed")
    command = [str(path), *map(str, arguments)]
    tail: deque[str] = deque(maxlen=_TAIL)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(stock),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line)
            on_line(line)
    if process.returncode != 0:
        raise DemoError(f"{program} failed with exit status {process.returncode}; it said:\n{''.join(tail)}")


def train(files: Files, stock: bool) -> float:
    """Train, showing a progress bar on a terminal.

    Returns:
        Seconds that it took, start of the program included.

    Raises:
        DemoError: training failed or left no checkpoint.
    """
    started = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=_err,
        disable=not _err.is_terminal,
    )
    with bar, files.log.open("w", buffering=1, encoding="utf-8") as log:
        task = bar.add_task("training", total=files.settings["train_steps"])

        def advance(line: str) -> None:
            log.write(line)
            if step := _STEP.search(line):
                bar.update(task, completed=int(step[1]), description=f"training (accuracy {step[2]}%)")
                if not _err.is_terminal:
                    _err.print(f"step {step[1]}: accuracy {step[2]}%")

        run("onmt_train", "-config", files.config, stock=stock, on_line=advance)
    if not files.model.is_file():
        raise DemoError(f"onmt_train left no checkpoint {files.model.relative_to(ROOT)}")
    return time.monotonic() - started


def report_in(log: Path) -> str:
    """The plugin's report in a training log.

    Raises:
        DemoError: there is none, so that the plugin took no part in the training.
    """
    lines = iter(log.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if REPORT_TITLE in line:
            block = [_LOG_PREFIX.sub("", line)]
            for following in lines:
                if _LOG_PREFIX.match(following):
                    break
                block.append(following)
            return "\n".join(block).rstrip()
    raise DemoError(f"no report of the plugin in {log}: is sd-plugin installed beside {sys.executable}?")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def score(hypotheses: list[str], references: list[str]) -> tuple[float, str]:
    """BLEU in per cent and sacrebleu's signature.

    Raises:
        DemoError: the numbers of lines differ.
    """
    from sacrebleu.metrics import BLEU

    if len(hypotheses) != len(references):
        raise DemoError(f"{len(hypotheses)} translations of {len(references)} numbers")
    # Both sides are separate words already.
    metric = BLEU(tokenize="none")
    bleu = metric.corpus_score(hypotheses, [references])
    return bleu.score, str(metric.get_signature())


def show(sources: list[str], hypotheses: list[str], references: list[str], rows: int = 5, wrong: int = 3) -> None:
    """Print the first ``rows`` translations, then up to ``wrong`` of the wrong ones among the rest."""
    triples = list(zip(sources, hypotheses, references, strict=True))
    mistakes = [triple for triple in triples[rows:] if triple[1] != triple[2]]
    table = Table("German", "translated", "correct", title=f"the first {rows} held-out numbers, then mistakes")
    for source, hypothesis, reference in triples[:rows] + mistakes[:wrong]:
        style = "" if hypothesis == reference else "red"
        table.add_row(source, hypothesis, reference, style=style)
    _out.print(table)
    right = sum(hypothesis == reference for _, hypothesis, reference in triples)
    _out.print(f"{right} of {len(triples)} held-out numbers are right")


def demo(stock: bool, min_bleu: float) -> None:
    """Do everything.

    Raises:
        DemoError, DataError, OSError: a stage failed, or BLEU is below ``min_bleu``.
    """
    files = Files.of("demo" if stock else "demo_sd")
    get_data.prepare("demo", ROOT / "data")
    # What an earlier run left must not be taken for a result of this one.
    for stale in (files.log, files.model, files.hypotheses):
        stale.unlink(missing_ok=True)
    files.log.parent.mkdir(parents=True, exist_ok=True)
    # Both configurations name the same vocabulary, which knows nothing of dropout.
    vocabulary = ROOT / "configs" / "demo.yaml"
    run("onmt_build_vocab", "-config", vocabulary, "-n_sample", -1, "-overwrite", stock=stock)
    seconds = train(files, stock)
    report = None if stock else report_in(files.log)

    source = ROOT / "data/demo/test.de"
    run(
        *("onmt_translate", "-model", files.model, "-src", source, "-output", files.hypotheses),
        *("-batch_size", 100),
        stock=stock,
    )
    hypotheses, references = read_lines(files.hypotheses), read_lines(source.with_suffix(".en"))
    bleu, signature = score(hypotheses, references)
    show(read_lines(source), hypotheses, references)
    if report:
        _out.print(report, soft_wrap=True)
    _out.print(f"{files.config.name}: trained in {seconds:.0f} s")
    _out.print(f"BLEU {bleu:.2f} ({signature})", soft_wrap=True)
    if bleu < min_bleu:
        raise DemoError(f"BLEU {bleu:.2f} is below {min_bleu:g}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    stock: Annotated[bool, typer.Option("--stock", help="Train without the plugin, for comparison.")] = False,
    min_bleu: Annotated[float, typer.Option(help="Fail below this BLEU.")] = 90.0,
) -> None:
    """Train on German number words with structured dropout and translate held-out ones. Takes minutes."""
    interruption.is_raised()
    if not 0 <= min_bleu <= 100:  # nor is nan
        _err.print(f"demo: --min-bleu must be from 0 to 100, got {min_bleu:g}")
        raise typer.Exit(2)
    try:
        demo(stock, min_bleu)
    except KeyboardInterrupt:
        interruption.is_over()
        _err.print("demo: interrupted")
        raise typer.Exit(interruption.STATUS) from None
    except (DemoError, DataError, OSError) as error:
        _err.print(f"demo: {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    run_app(app, "demo.py")
