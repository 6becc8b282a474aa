"""The text that a tagger is trained on, as CoNLL-2003 has it; and word vectors where no trained ones are at hand."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from whole_file import write_whole

from sd_plugin.errors import UsageError

PARTS = ("train", "dev", "test")

_TAG = re.compile(r"O|[BI]-.+")


def find(folder: Path | None, checkout: Path) -> dict[str, Path]:
    """The files of all :data:`PARTS`: in ``folder`` if given, else in the checkout's, else in ``data/conll2003``.

    Raises:
        UsageError: they are not there; the text says what to do.
    """
    own = checkout / "data" / "NER" / "CoNNL_2003_shared_task"
    chosen = folder or (own if own.is_dir() else Path("data", "conll2003"))
    files = {part: chosen.resolve() / f"{part}.txt" for part in PARTS}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise UsageError(
            f"{chosen} has no {', '.join(missing)}: name a folder with CoNLL-2003 by --data, or make data/conll2003 "
            "with scripts/get_data.py conll2003"
        )
    return files


def tokens(path: Path) -> Iterator[tuple[str, str] | None]:
    """Words with their tags, and None after each sentence: the first and the last column of every line.

    Raises:
        UsageError: the file cannot be read, or is not made of such lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__})") from error
    inside = False
    for number, line in enumerate(lines, start=1):
        columns = line.strip().split(" ")
        if columns == [""] or columns[0].startswith("-DOCSTART-"):
            if inside:
                yield None
            inside = False
            continue
        if len(columns) < 2 or not _TAG.fullmatch(columns[-1]):
            raise UsageError(f"{path}, line {number}: expected a word and, last, a tag like B-PER, I-PER or O")
        yield columns[0], columns[-1]
        inside = True
    if inside:
        yield None


def count_sentences(path: Path) -> int:
    """The number of sentences; errors as :func:`tokens`."""
    return sum(token is None for token in tokens(path))


def words(paths: Iterable[Path]) -> list[str]:
    """Every lower-cased word once, in order of appearance; errors as :func:`tokens`."""
    return list({token[0].lower(): None for path in paths for token in tokens(path) if token is not None})


def write_vectors(files: Mapping[str, Path], target: Path, size: int, seed: int) -> int:
    """Write a random vector for each word of ``files``, in the text format of GloVe.

    Uniform in ±sqrt(3 / size), which has variance 1 / size (Ma and Hovy 2016, for words without a vector). Words are
    lower-cased, as GloVe's are, so that spellings of a word start alike.

    Returns:
        The number of words. The same text, size and seed give the same file.
    """
    import torch

    found = words(files.values())
    bound = math.sqrt(3.0 / size)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(len(found), size).uniform_(-bound, bound, generator=generator)
    lines = (
        f"{word} {' '.join(f'{x:.6f}' for x in vector)}\n" for word, vector in zip(found, vectors.tolist(), strict=True)
    )
    write_whole(target, "".join(lines))
    return len(found)
