"""F1 of a saved tagger by two scorers that should agree: the host's Perl script conlleval, and seqeval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: conlleval prints two digits after the point.
_ROUNDING = 0.0051


@dataclass(frozen=True)
class Score:
    """Entity-level F1 of one part of the corpus, in percent.

    Attributes:
        conlleval: by the Perl script, two digits after the point.
        seqeval: by the library; None if it is not installed.
    """

    conlleval: float
    seqeval: float | None

    @property
    def agrees(self) -> bool:
        """The two are the same, or there is only one."""
        return self.seqeval is None or abs(self.conlleval - self.seqeval) <= _ROUNDING

    def __str__(self) -> str:
        missing = "not by seqeval, which is not installed: pip install --use-pep517 '.[ner]'"
        other = missing if self.seqeval is None else f"{self.seqeval:.3f} seqeval"
        return f"{self.conlleval:.2f} conlleval, {other}"


def seqeval_f1(targets: Sequence[Sequence[str]], outputs: Sequence[Sequence[str]]) -> float | None:
    """Micro-averaged F1 of entities in percent; None if seqeval is not installed.

    Args:
        targets, outputs: a sequence of tags for each sentence.
    """
    try:
        from seqeval.metrics import f1_score
    except ImportError:
        return None
    # Its default mode is the one that counts as conlleval does.
    return 100.0 * float(f1_score(list(map(list, targets)), list(map(list, outputs)), zero_division=0))


def score(tagger: Any, path: Path) -> Score:
    """Tag a file with a tagger of the host, and score the result.

    Args:
        tagger: in the working directory there must be ``conlleval``; path: with the right tags in the last column.
    """
    from src.data_io.data_io_connl_ner_2003 import DataIOConnlNer2003
    from src.evaluators.evaluator_f1_micro_spans_connl import EvaluatorF1MicroSpansConnl

    sentences, targets = DataIOConnlNer2003().read_data(str(path), verbose=False)
    # The batch size of the host's own evaluation.
    outputs = tagger.predict_tags_from_words(sentences, batch_size=100)
    conlleval, _ = EvaluatorF1MicroSpansConnl().get_evaluation_score(targets, outputs, sentences)
    return Score(conlleval, seqeval_f1(targets, outputs))
