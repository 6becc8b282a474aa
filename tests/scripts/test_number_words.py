"""The demo corpus: the segmentation loses nothing, and what is tested was never trained on."""

from __future__ import annotations

import importlib.util
import random
import re

import number_words
import pytest
from hypothesis import given
from hypothesis import strategies as st

spells = pytest.mark.skipif(importlib.util.find_spec("num2words") is None, reason="num2words is not installed")
numbers = st.integers(1, number_words.LARGEST)
SMALL = number_words.Sizes(train=60, valid=10, test=20)


@spells
@given(numbers)
def test_joining_the_morphemes_restores_the_german_word(number: int) -> None:
    from num2words import num2words

    word = num2words(number, lang="de")
    pieces = number_words.segment(word)
    assert number_words.join(pieces) == word
    assert number_words.german(number).split(" ") == pieces


@spells
@given(numbers)
def test_english_keeps_every_letter_and_has_no_empty_word(number: int) -> None:
    from num2words import num2words

    line = number_words.english(number)
    assert line.replace(" ", "") == re.sub(r"[-, ]", "", num2words(number, lang="en"))
    assert "" not in line.split(" ")


@spells
@given(numbers, numbers)
def test_different_numbers_are_different_sentences(one: int, other: int) -> None:
    assert (number_words.german(one) == number_words.german(other)) == (one == other)
    assert (number_words.english(one) == number_words.english(other)) == (one == other)


@spells
@pytest.mark.parametrize(
    ("number", "german", "english"),
    [
        (1, "eins", "one"),
        (16, "sechzehn", "sixteen"),
        (43, "drei und vierzig", "forty three"),
        (71, "ein und siebzig", "seventy one"),
        (101, "ein hundert eins", "one hundred and one"),
        (
            243_017,
            "zwei hundert drei und vierzig tausend siebzehn",
            "two hundred and forty three thousand and seventeen",
        ),
    ],
)
def test_word_order_differs_between_the_languages(number: int, german: str, english: str) -> None:
    assert number_words.german(number) == german
    assert number_words.english(number) == english


@pytest.mark.parametrize("word", ["eine Million", "zweihundertx", "xzwei", "Zwei", "zwei hundert", "dreißigg"])
def test_what_is_no_number_word_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(word))):
        number_words.segment(word)


@given(st.integers(0, 2**64))
def test_parts_are_disjoint_whole_and_determined_by_the_seed(seed: int) -> None:
    parts = number_words.make(seed, SMALL)
    random.random()  # the module's own generator must not depend on the global one
    assert number_words.make(seed, SMALL) == parts
    assert [len(parts[part]) for part in ("train", "valid", "test")] == [60, 10, 20]
    drawn = [number for part in parts.values() for number in part]
    assert len(set(drawn)) == len(drawn)
    assert min(drawn) >= 1
    assert max(drawn) <= number_words.LARGEST


def test_another_seed_gives_another_corpus() -> None:
    assert number_words.make(1, SMALL) != number_words.make(2, SMALL)


@spells
def test_training_covers_the_vocabulary_of_both_languages() -> None:
    parts = number_words.make(1234)
    for words in (number_words.german, number_words.english):
        missing = {word for number in parts["test"] for word in words(number).split(" ")}
        for number in parts["train"]:
            missing -= set(words(number).split(" "))
            if not missing:
                break
        assert not missing


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (500_000, 1, 1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="number"):
        number_words.make(1, number_words.Sizes(*sizes))
