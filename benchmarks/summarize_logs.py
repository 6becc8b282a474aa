#!/usr/bin/env python
"""Writes the table of OpenNMT-py training logs in benchmarks/results/README.md, from the logs alone.

    python benchmarks/summarize_logs.py [--check]

``--check`` writes nothing and fails if the table in the file is not what the logs give.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- table of the logs: begin -->", "<!-- table of the logs: end -->"


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
    """

    name: str
    steps: int
    train: tuple[float, float]
    valid: list[float]
    skipped: str
    lost: str

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
        return cls(path.stem, int(steps[-1][0]), train, valid, skipped[1] if skipped else "-", told)

    def row(self) -> str:
        """Its line of the table."""
        valid = " → ".join(f"{value:.1f}" for value in self.valid)
        train = " → ".join(f"{value:.1f}" for value in self.train)
        return f"| [{self.name}]({self.name}.log) | {self.steps} | {train} | {valid} | {self.skipped} | {self.lost} |"


def table() -> str:
    """The Markdown table of every log in benchmarks/results."""
    head = [
        "| log | steps | training perplexity, first → last interval | validation perplexity | skipped | hints lost |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(Run.read(path).row() for path in sorted(RESULTS.glob("*.log")))])


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if the table is out of date")
    check = parser.parse_args().check
    readme = RESULTS / "README.md"
    before = readme.read_text(encoding="utf-8")
    head, rest = before.split(BEGIN)
    after = f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
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
