"""One sentencepiece model for both sides of a prepared corpus; sentencepiece itself is needed for nothing else."""

import importlib
from pathlib import Path
from types import ModuleType

from corpus_files import DataError, sync

#: Name of the model in a prepared folder.
MODEL = "spm.model"


def library() -> ModuleType:
    """The module sentencepiece; imported here, because all but ``--sentencepiece`` does without.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise DataError("--sentencepiece needs sentencepiece: pip install sentencepiece") from error


def train(folder: Path, languages: tuple[str, str], size: int, stage: Path) -> Path:
    """Train one subword model on both sides of the training text.

    Args:
        folder: a prepared corpus.
        languages: its two languages.
        size: number of pieces.
        stage: a working folder.

    Returns:
        The model, in ``stage``.

    Raises:
        DataError: the text cannot be cut into that many pieces.
    """
    try:
        library().SentencePieceTrainer.train(
            input=[str(folder / f"train.{language}") for language in languages],
            model_prefix=str(stage / "spm"),
            vocab_size=size,
            character_coverage=1.0,
            num_threads=1,  # the model must not depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # Its message begins with the C++ source line and the failed assertion, bracketed.
        reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
        raise DataError(f"--sentencepiece {size}: {reason}") from error
    model = stage / MODEL
    sync(model)
    return model
