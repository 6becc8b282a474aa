"""Tables of trainings other than OpenNMT-py's, from what their programs wrote."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODES = {"random": "NR+Random", "nr_st": "NR+ST", "nr_rh_st": "NR+RH+ST"}


def _table(titles: str, rows: list[str]) -> str:
    return "\n".join([f"| {titles} |", "|---" * (titles.count("|") + 1) + "|", *rows])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _present(folder: Path, ending: str) -> list[tuple[str, Path]]:
    """The modes that ``folder`` has a file of, with that file."""
    found = [(mode, folder / f"{mode}{ending}") for mode in MODES]
    return [(mode, path) for mode, path in found if path.is_file()]


def _arrows(values: list[str], digits: int) -> str:
    return " → ".join(f"{float(value):.{digits}f}" for value in values)


def awd_lstm() -> str:
    """Epochs of ``main.py``, from its output."""
    rows = []
    for mode, path in _present(RESULTS / "awd_lstm", ".log"):
        text = path.read_text(encoding="utf-8")
        epochs = re.findall(r"end of epoch +\d+ \| time: *([\d.]+)s .* valid ppl +([\d.]+)", text)
        test = re.findall(r"End of training \| .* test ppl +([\d.]+)", text)
        if not epochs or len(test) != 1:
            raise ValueError(f"{path.name} is not the log of a finished training")
        skipped = re.search(r"multiply-adds of these products skipped \(([\d.]+%)\)", text)
        lost = re.findall(r"^  \S+ +\d+ +[\d.]+% +(?:[\d.]+%|-) +\d+ +(\d+)$", text, re.MULTILINE)
        told = f"{skipped[1]} | {sum(map(int, lost))}" if skipped else "- | -"
        valid, seconds = _arrows([ppl for _, ppl in epochs], 1), _arrows([time for time, _ in epochs], 1)
        rows.append(f"| [{MODES[mode]}](awd_lstm/{path.name}) | {valid} | {float(test[0]):.1f} | {seconds} | {told} |")
    return _table("mode | valid perplexity | test perplexity | seconds an epoch | skipped | hints lost", rows)


def zaremba() -> str:
    """Epochs of ``scripts/zaremba_main.py``, from its logs and results."""
    rows = []
    for mode, path in _present(RESULTS / "zaremba_medium", ".csv"):
        epochs, result = _rows(path), _result(path)
        train, valid = (_arrows([row[f"{part}_perplexity"] for row in epochs], 1) for part in ("train", "valid"))
        seconds, done = _arrows([row["seconds"] for row in epochs], 0), f"{len(epochs)} of {epochs[-1]['epochs']}"
        test, skipped = f"{result['test_perplexity']:.1f}", f"{100 * float(epochs[-1]['skipped']):.1f}%"
        link = f"[{MODES[mode]}](zaremba_medium/{path.name})"
        rows.append(f"| {link} | {done} | {train} | {valid} | {test} | {seconds} | {skipped} |")
    titles = "mode | epochs | train perplexity | valid perplexity | test perplexity | seconds an epoch | skipped"
    return _table(titles, rows)


def ner_scores() -> str:
    """F1 of ``scripts/ner_main.py``: of each epoch by conlleval, of the best saved tagger by both."""
    rows = []
    for mode, path in _present(RESULTS / "ner", ".csv"):
        trained, best = [row for row in _rows(path) if int(row["epoch"]) > 0], _result(path)["scores"]
        dev, test = (_arrows([row[f"{part}_f1"] for row in trained], 2) for part in ("dev", "test"))
        told = " | ".join(f"{best['test'][by]:.2f}" for by in ("conlleval", "seqeval"))
        rows.append(f"| [{MODES[mode]}](ner/{path.name}) | {dev} | {test} | {told} |")
    return _table("setting | dev F1 | test F1 | test F1 of the best on dev | by seqeval", rows)


def ner_times() -> str:
    """Seconds of the last epoch of ``scripts/ner_main.py`` on a quiet machine."""
    rows = []
    for mode, path in _present(RESULTS / "ner" / "timed", ".csv"):
        last = _rows(path)[-1]
        seconds = [float(last[name]) for name in ("training_s", "lstm_forward_s", "lstm_backward_s")]
        per_batch = " | ".join(f"{1000 * value / int(last['batches']):.1f}" for value in seconds)
        rows.append(f"| [{MODES[mode]}](ner/timed/{path.name}) | {last['batches']} | {per_batch} |")
    return _table("setting | batches | whole step, ms | BiLSTM forward, ms | BiLSTM backward, ms", rows)


def _result(log: Path) -> Any:
    return json.loads(log.with_suffix(".json").read_text(encoding="utf-8"))
