"""The stand-in for targer in ``standins/targer``: copies of it, its modules, a corpus, and taggers.

It has the modules, classes and signatures of the host that the plugin and its launcher use, but is no copy: what it
shares with the host is where dropout is, how sequences are sorted and packed, and how files are read and written.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

#: The tagger modules and their classes.
TAGGERS = {
    "tagger_birnn": "TaggerBiRNN",
    "tagger_birnn_cnn": "TaggerBiRNNCNN",
    "tagger_birnn_crf": "TaggerBiRNNCRF",
    "tagger_birnn_cnn_crf": "TaggerBiRNNCNNCRF",
}
#: Three sentences of different lengths, the longest not first, with their tags.
SENTENCES = [["Anna", "sleeps"], ["Bob", "Smith", "and", "Anna", "go"], ["rain"]]
TAGS = [["B-PER", "O"], ["B-PER", "I-PER", "O", "B-PER", "O"], ["O"]]

#: The words of the corpus that `write_data` makes, with their tags.
WORDS = {"Anna": "B-PER", "Bern": "B-LOC", "Smith": "I-PER", "goes": "O", "to": "O", "12": "O"}


def copy(folder: Path) -> Path:
    """Copy the stand-in to ``folder``, which is returned."""
    here = Path(__file__).parent / "standins" / "targer"
    shutil.copytree(here, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def write_data(folder: Path, sentences: int = 40) -> Path:
    """Write train, dev and test of a small corpus in the format of CoNLL-2003 to ``folder``, which is returned."""
    words = list(WORDS)
    folder.mkdir(parents=True, exist_ok=True)
    for offset, part in enumerate(("train", "dev", "test")):
        chosen = [
            [words[(7 * i + k * (3 + offset + k)) % len(words)] for k in range(1 + i % 6)] for i in range(sentences)
        ]
        blocks = ("".join(f"{word} X X {WORDS[word]}\n" for word in sentence) for sentence in chosen)
        (folder / f"{part}.txt").write_text("\n".join(blocks))
    return folder


def forget() -> None:
    """Drop the host's modules."""
    for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
        del sys.modules[name]


@contextmanager
def imported(folder: Path) -> Iterator[dict[str, ModuleType]]:
    """The stand-in's modules by the last part of their names, importable within the context."""
    forget()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        importlib.import_module("src.factories.factory_tagger")
        yield {name.rpartition(".")[2]: module for name, module in sys.modules.items() if name.startswith("src.")}
    finally:
        sys.path.remove(str(folder))
        forget()


def tagger(
    modules: dict[str, ModuleType],
    module: str = "tagger_birnn_cnn_crf",
    words: list[str] | None = None,
    tags: list[str] | None = None,
    **options: Any,
) -> Any:
    """A tagger that knows these words and tags; those of :data:`SENTENCES` if None."""
    indexer = importlib.import_module("src.seq_indexers.indexer").Indexer
    words = [word for sentence in SENTENCES for word in sentence] if words is None else words
    return getattr(modules[module], TAGGERS[module])(
        indexer(words), indexer(tags or ["O", "B-PER", "I-PER"]), **options
    )
