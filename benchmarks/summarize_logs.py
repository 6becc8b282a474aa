#!/usr/bin/env python
"""Writes the tables of trainings in benchmarks/results/README.md, from the files beside it alone.

    python benchmarks/summarize_logs.py [--check]

``--check`` writes nothing and fails if the tables in the file are not what the files give. Of OpenNMT-py's logs only
those in ``timed/`` were made on a quiet machine; the seconds of the others would mean nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import run_tables
from run_tables import RESULTS


@dataclass(frozen=True)
class Run:
    """What one log says.

    Attributes:
        name: the log's file name without its ending.
        steps: training steps made.
        train: training perplexity over the first and the last reported interval.
        valid: validation perplexities, in order.
        skipped: share of the structured products' multiply-adds that was left out, as the log has it.
        lost: hints lost, over all sites.
        seconds: from the start of training to its last step, validation included.
    """

    name: str
    steps: int
    train: tuple[float, float]
    valid: list[float]
    skipped: str
    lost: str
    seconds: int

    @classmethod
    def read(cls, path: Path) -> Run:
        """Parse a log of ``onmt_train``; ValueError if it holds no finished training."""
        text = path.read_text(encoding="utf-8")
        steps = re.findall(r"Step (\d+)/ *(\d+); acc: *[\d.]+; ppl: *([\d.]+)", text)
        if not steps or steps[-1][0] != steps[-1][1]:
            raise ValueError(f"{path.name} is not the log of a finished training")
        valid = [float(value) for value in re.findall(r"Validation perplexity: ([\d.]+)", text)]
        skipped = re.search(r"multiply-adds of these products skipped \(([\d.]+%)\)", text)
        lost = re.findall(r"^  \S+ +\d+ +[\d.]+% +(?:[\d.]+%|-) +\d+ +(\d+)$", text, re.MULTILINE)
        train = (float(steps[0][2]), float(steps[-1][2]))
        told = str(sum(map(int, lost))) if skipped else "-"
        seconds = int(re.findall(r"tok/s; +(\d+) sec;", text)[-1])
        return cls(path.stem, int(steps[-1][0]), train, valid, skipped[1] if skipped else "-", told, seconds)

    def row(self, folder: Path, timed: bool) -> str:
        """Its line of the table of ``folder``'s logs."""
        valid = " → ".join(f"{value:.1f}" for value in self.valid)
        train = " → ".join(f"{value:.1f}" for value in self.train)
        link = f"[{self.name}]({(folder / self.name).relative_to(RESULTS)}.log)"
        row = f"| {link} | {self.steps} | {train} | {valid} | {self.skipped} | {self.lost} |"
        return f"{row} {self.seconds} |" if timed else row


def table(folder: Path, timed: bool) -> str:
    """The Markdown table of every log in ``folder``."""
    titles = "log | steps | training perplexity, first → last interval | validation perplexity | skipped | hints lost"
    head = [f"| {titles} | seconds |" if timed else f"| {titles} |", "|---" * (6 + timed) + "|"]
    return "\n".join([*head, *(Run.read(path).row(folder, timed) for path in sorted(folder.glob("*.log")))])


#: Name of a table's marks -> what makes it. OpenNMT-py's: the folder of its logs, and whether to show their times.
TABLES: dict[str, Callable[[], str]] = {
    "the logs": partial(table, RESULTS, False),
    "the timed logs": partial(table, RESULTS / "timed", True),
    "AWD-LSTM": run_tables.awd_lstm,
    "Zaremba medium": run_tables.zaremba,
    "F1": run_tables.ner_scores,
    "the time of NER": run_tables.ner_times,
}


def updated(text: str) -> str:
    """``text`` with every table made anew."""
    for name, made in TABLES.items():
        begin, end = f"<!-- table of {name}: begin -->", f"<!-- table of {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if a table is out of date")
    check = parser.parse_args().check
    readme = RESULTS / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = updated(before)
    if check:
        if before != after:
            print("benchmarks/results/README.md is out of date: run benchmarks/summarize_logs.py", file=sys.stderr)
        return int(before != after)
    temporary = readme.with_suffix(".tmp")
    temporary.write_text(after, encoding="utf-8")
    temporary.replace(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
