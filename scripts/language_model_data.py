"""The text of a language model: words of train, valid and test as numbers, and in columns for a batch."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd_plugin import UsageError

PARTS = ("train", "valid", "test")
#: The word that stands for the end of a line, and the one for a word that train does not have.
END, UNKNOWN = "<eos>", "<unk>"


@dataclass(frozen=True)
class Corpus:
    """A text whose words are numbers.

    Attributes:
        words: the vocabulary: a word's number is its place. The frequent ones come first.
        parts: part -> the numbers of its words in order, int64 ``[n]``.
        note: what the user should know of it, or an empty string.
    """

    words: list[str]
    parts: dict[str, Tensor]
    note: str = ""

    def digest(self) -> str:
        """SHA-256 of the vocabulary and all parts, in hexadecimal: equal for equal text, wherever it lies."""
        state = hashlib.sha256("\n".join(self.words).encode())
        for part in PARTS:
            state.update(self.parts[part].numpy().tobytes())
        return state.hexdigest()


def read_corpus(folder: Path) -> Corpus:
    """Read ``train.txt``, ``valid.txt`` and ``test.txt``, or ``NAME.train.txt`` and so on.

    Words are what white space parts; the end of each line is the word ``<eos>``. The vocabulary is that of train. Other
    words are ``<unk>``, which joins the vocabulary if train does not have it: the model then never learns to expect it.

    Raises:
        UsageError: a file is missing, empty or not UTF-8, or two would do. OSError: one cannot be read.
    """
    paths = {part: _find(folder, part) for part in PARTS}
    counts = Counter(word for _, word in _words(paths["train"]))
    words = [word for word, _ in counts.most_common()]
    unknown = [(path, line, word) for path in paths.values() for line, word in _words(path) if word not in counts]
    note = ""
    if unknown and UNKNOWN not in counts:
        words.append(UNKNOWN)
        path, line, word = unknown[0]
        note = (
            f"{len(unknown):,} words of valid and test are not in train, which has no {UNKNOWN} to learn them by; "
            f"the first is {word!r}, {path} line {line}"
        )
    numbers = {word: number for number, word in enumerate(words)}
    return Corpus(words, {part: _numbered(path, numbers) for part, path in paths.items()}, note)


def _find(folder: Path, part: str) -> Path:
    """The file of a part."""
    if (path := folder / f"{part}.txt").is_file():
        return path
    found = sorted(folder.glob(f"*.{part}.txt"))
    if not found:
        raise UsageError(
            f"no {part}.txt or NAME.{part}.txt in {folder}: "
            "run python scripts/get_data.py ptb, or name another folder with --data"
        )
    if len(found) > 1:
        raise UsageError(f"{found[0]} or {found[1]}? There must be one NAME.{part}.txt")
    return found[0]


def _words(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and word, for each word of a file."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                for word in line.split():
                    yield number, word
                yield number, END
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _numbered(path: Path, numbers: dict[str, int]) -> Tensor:
    """A file's words as their numbers, int64 ``[n]``."""
    # A word that is not there can only be one of valid or test, and then there is <unk>.
    found = torch.tensor([numbers[word] if word in numbers else numbers[UNKNOWN] for _, word in _words(path)])
    if not len(found):
        raise UsageError(f"{path} is empty")
    return found


def columns(text: Tensor, count: int) -> Tensor:
    """Cut a text ``[n]`` into ``count`` pieces of equal length, side by side: ``[n // count, count]``.

    Up to ``count - 1`` words at the end are left out.

    Raises:
        UsageError: a column has not two words, so that there is none to predict.
    """
    if len(text) < 2 * count:
        raise UsageError(f"a text of {len(text):,} words cannot be read in {count} columns")
    return text[: len(text) // count * count].view(count, -1).t().contiguous()


def sequences(text: Tensor, length: int, whole: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Successive pieces of columns ``[n, B]``, with what follows each of their words.

    Args:
        length: time steps T of a piece; the last one may be shorter.
        whole: leave out a last piece that is shorter.

    Yields:
        ``(words, targets)``, both ``[T, B]``; the targets are the words one time step later.
    """
    predicted = len(text) - 1
    for start in range(0, predicted // length * length if whole else predicted, length):
        stop = min(start + length, predicted)
        yield text[start:stop], text[start + 1 : stop + 1]
