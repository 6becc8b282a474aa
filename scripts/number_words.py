"""The demo corpus: German number words to English number words, made here and so free of any licence.

The task is a real translation in miniature. German says the units before the tens (*drei und vierzig*, three
and forty) where English says *forty three*, inside the thousands as well as after them: the decoder has to
reorder, and its attention has to look in the right place. *And* stands in different places in the two
languages. The numbers that are tested never appear in training.

Tokenisation. German writes a number as one compound: 243 000 is *zweihundertdreiundvierzigtausend*. To a
word-level model every such compound is an unknown word, so the source is split into its morphemes (*zwei
hundert drei und vierzig tausend*), as compound splitting does in any German system. The split only inserts
spaces: order, inflection (*ein* and *eins*) and irregular forms (*sechzehn*, *siebzig*) stay as German has
them, and joining the pieces restores the word (:func:`join`). On the target side the hyphen of *forty-three*
and the comma after the thousands become word boundaries.
"""

import random
import re
from dataclasses import dataclass

#: Numbers run from 1 to this one (inclusive): above it German begins to write spaces (*eine Million*).
LARGEST = 999_999

_UNITS = ("null", "ein", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
# The stems of sechzehn and sechzig, siebzehn and siebzig are shorter than the units.
_ROOTS = ("vier", "fünf", "sech", "sieb", "acht", "neun")
_TEENS = ("zehn", "elf", "zwölf", "dreizehn", *(f"{root}zehn" for root in _ROOTS))
_TENS = ("zwanzig", "dreißig", *(f"{root}zig" for root in _ROOTS))
_STEMS = (*_UNITS, *_TEENS, *_TENS, "und", "hundert", "tausend")
# Longest first, so that "eins" is not read as "ein" with a rest, nor "dreizehn" as "drei" "zehn".
_MORPHEME = re.compile("|".join(sorted(_STEMS, key=len, reverse=True)))


@dataclass(frozen=True)
class Sizes:
    """How many numbers each part of the corpus holds."""

    train: int = 16_000
    valid: int = 500
    test: int = 500

    def total(self) -> int:
        """All numbers that have to be drawn."""
        return self.train + self.valid + self.test


def segment(compound: str) -> list[str]:
    """Split a German number compound into its morphemes.

    Args:
        compound: a number below a million as German writes it, in lower case and without spaces.

    Returns:
        The morphemes in order; joined together they are ``compound`` again.

    Raises:
        ValueError: some part of ``compound`` is no number morpheme.
    """
    pieces = _MORPHEME.findall(compound)
    if "".join(pieces) != compound:
        raise ValueError(f"not a German number word below a million: {compound!r}")
    return pieces


def join(pieces: list[str]) -> str:
    """The compound that :func:`segment` split: its inverse."""
    return "".join(pieces)


def _spell(number: int, language: str) -> str:
    """``number`` as num2words writes it."""
    from num2words import num2words  # here, because get_data.py must do without for every other corpus

    return num2words(number, lang=language)


def german(number: int) -> str:
    """``number`` as a line of the source side: morphemes separated by spaces."""
    return " ".join(segment(_spell(number, "de")))


def english(number: int) -> str:
    """``number`` as a line of the target side: words separated by spaces."""
    return " ".join(re.findall(r"[a-z]+", _spell(number, "en")))


def _draw(count: int, rng: random.Random) -> list[int]:
    """``count`` different numbers, drawn by length first: of uniform ones nine in ten had six digits."""
    lengths, weights = range(2, 7), (1, 2, 4, 8, 16)
    seen: dict[int, None] = {}
    while len(seen) < count:
        (digits,) = rng.choices(lengths, weights)
        # Lengths 1 and 2 share a stratum: there are too few one-digit numbers for one of their own.
        lowest = 1 if digits == 2 else 10 ** (digits - 1)
        seen[rng.randint(lowest, 10**digits - 1)] = None
    return list(seen)


def make(seed: int, sizes: Sizes | None = None) -> dict[str, list[int]]:
    """Draw the corpus.

    Args:
        seed: the same seed gives the same corpus.
        sizes: how many numbers each part holds.

    Returns:
        The numbers of the parts "train", "valid" and "test"; no number is in two of them.

    Raises:
        ValueError: a size is not positive, or more numbers are asked for than the strata can supply.
    """
    sizes = sizes or Sizes()
    if min(sizes.train, sizes.valid, sizes.test) < 1:
        raise ValueError("every part of the corpus needs at least one number")
    if sizes.total() > LARGEST // 2:
        raise ValueError(f"at most {LARGEST // 2} different numbers can be drawn, not {sizes.total()}")
    rng = random.Random(seed)
    numbers = _draw(sizes.total(), rng)
    # Short numbers are exhausted early in the drawing; shuffling spreads them over the parts.
    rng.shuffle(numbers)
    valid_from, test_from = sizes.train, sizes.train + sizes.valid
    return {
        "train": numbers[:valid_from],
        "valid": numbers[valid_from:test_from],
        "test": numbers[test_from:],
    }
