"""A host's source is known by the functions a patch relies on, whatever else it holds and however it is written."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_plugin.patches._fingerprint import Function, difference, source_of
from sd_plugin.patches.awd_lstm import CHECKOUT

STANDIN = Path(__file__).parent / "standins" / "awd_lstm"
#: Every function that the patch for awd-lstm-lm relies on.
KNOWN = [(path, name) for path, expected in CHECKOUT.fingerprints.items() for name in expected]

SOURCE = """\
import os
class Layer(Base):
    value = 1
    def __init__(self, module, p=0, *, locked=False):
        self.module = module
        self.setup(p, locked)
    def forward(self, *args, **kwargs):
        with no_grad():
            drop(self.module)
        return self.module(*args)
def embedded(embed, words, p=0.1):
    return lookup(embed.weight, words, p)
"""
FINGERPRINT = {
    "Layer.__init__": Function.of("self module p * locked", "setup", "module"),
    "Layer.forward": Function.of("self *args **kwargs", "drop", "no_grad"),
    "embedded": Function.of("embed words p", "lookup", "weight"),
}
#: A change to the source, and what is told of it.
CHANGES = [
    ("def __init__(", "def __init_later__(", "it has no Layer.__init__"),
    ("class Layer(", "class Layers(", "it has no Layer.__init__"),
    ("def embedded(", "def old_embedded(", "it has no embedded"),
    ("self, module, p=0", "self, p=0, module=None", "Layer.__init__ takes (self p module * locked), not ("),
    ("*, locked", "locked", "Layer.__init__ takes (self module p locked), not ("),
    (", **kwargs", "", "Layer.forward takes (self *args), not ("),
    ("embed, words,", "embed, words, extra, *,", "embedded takes (embed words extra * p), not ("),
    ("self.setup(", "self.prepare(", "Layer.__init__ does not use setup"),
    ("with no_grad()", "with nothing()", "Layer.forward does not use no_grad"),
    ("drop(self.module)", "pass", "Layer.forward does not use drop"),
    ("embed.weight", "embed.weights", "embedded does not use weight"),
]


@st.composite
def rewritten(draw: st.DrawFn, source: str = SOURCE) -> str:
    """The same program, written differently."""
    if draw(st.booleans()):
        return ast.unparse(ast.parse(source))
    lines = []
    for line in source.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += draw(st.lists(st.sampled_from(["", "# drop", f"{indent}# def embedded(x): pass"]), max_size=2))
        lines.append(line + draw(st.sampled_from(["", "  # lookup setup", "  "])))
    text = "\n".join(lines) + "\n"
    for before, after in ((", ", ",\n  # split\n        "), ("    ", "\t"), ("\n", "\r\n")):
        if draw(st.booleans()):
            text = text.replace(before, after)
    return text + draw(st.sampled_from(["", "def another(x):\n  return x\n", "if True:\n  value = 2\n", '"words"\n']))


@given(source=rewritten())
def test_formatting_comments_and_other_code_do_not_matter(source: str) -> None:
    assert difference(source, FINGERPRINT) is None


@pytest.mark.parametrize(("before", "after", "told"), CHANGES)
@given(data=st.data())
@settings(max_examples=5)
def test_any_change_of_what_is_relied_on_is_told(before: str, after: str, told: str, data: st.DataObject) -> None:
    assert SOURCE.count(before) == 1
    found = difference(data.draw(rewritten(SOURCE.replace(before, after))), FINGERPRINT)
    assert found is not None
    assert found.startswith(told)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", ""),
        ("a, b=1", "a b"),
        ("a, /, b", "a b"),
        ("a, *, b", "a * b"),
        ("*args, **kwargs", "*args **kwargs"),
        ("a: int, *args: str, b: int = 2", "a *args b"),
    ],
)
def test_arguments_of_every_kind(written: str, told: str) -> None:
    for keyword_async in ("", "async "):
        assert difference(f"{keyword_async}def f({written}):\n    pass\n", {"f": Function.of(told)}) is None
    assert difference(f"def f({written}):\n    pass\n", {"f": Function.of(f"{told} more".strip())}) is not None


def test_the_definition_that_counts_is_the_last() -> None:
    source = "def f(a): pass\ndef f(b): pass\n"
    assert difference(source, {"f": Function.of("b")}) is None
    assert difference(source, {"f": Function.of("a")}) == "f takes (b), not (a)"


def test_a_definition_may_depend_on_a_condition() -> None:
    for source in ("if True:\n    def f(a): pass\n", "try:\n    def f(a): pass\nfinally:\n    pass\n"):
        assert difference(source, {"f": Function.of("a")}) is None


def test_words_in_comments_and_text_are_no_use() -> None:
    source = "def f():\n    'dropout'\n    # dropout\n    g(dropout=1)\n"
    assert difference(source, {"f": Function.of("", "dropout")}) == "f does not use dropout"


def test_a_function_inside_another_is_not_the_function() -> None:
    assert difference("def g():\n    def f(a): pass\n", {"f": Function.of("a")}) == "it has no f"


@pytest.mark.parametrize("source", ["def f(:\n", "print 'of Python 2'\n", "def f():\n\0\n", "\x89PNG"])
def test_what_is_not_python(source: str) -> None:
    found = difference(source, {"f": Function.of("")})
    assert found is not None
    assert found.startswith("it is not Python (")


def test_nothing_expected_is_nothing_missed() -> None:
    assert difference("", {}) is None


@pytest.mark.parametrize(("path", "name"), KNOWN, ids=[name for _, name in KNOWN])
def test_every_part_of_a_real_fingerprint_counts(path: str, name: str) -> None:
    source, expected = (STANDIN / path).read_text(), CHECKOUT.fingerprints[path]
    assert difference(source, expected) is None
    short = name.rpartition(".")[2]
    without = re.sub(rf"\bdef {short}\b", f"def {short}_of_old", source)
    assert difference(without, {name: expected[name]}) == f"it has no {name}"
    for use in expected[name].uses:
        # Of all attributes and names, not of the function's own name and arguments.
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == use:
                node.attr = "changed"
            if isinstance(node, ast.Name) and node.id == use:
                node.id = "changed"
        assert difference(ast.unparse(tree), {name: expected[name]}) == f"{name} does not use {use}"


def test_the_source_of_a_module(tmp_path: Path) -> None:
    path = tmp_path / "some_module.py"
    path.write_text("value = 1  # ä\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("some_module", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert source_of(module) == "value = 1  # ä\n"
    path.unlink()
    assert source_of(module) is None


def test_modules_without_a_source() -> None:
    assert source_of(sys) is None
    assert source_of(ModuleType("made_up")) is None


@pytest.mark.parametrize("source", ["-" * 100_000 + "1", "x" + "[0]" * 20_000, "1" + "+1" * 100_000])
def test_source_that_no_parser_can_hold_is_not_the_hosts(source: str) -> None:
    told = difference(source, FINGERPRINT)
    assert told is not None
    assert told.startswith("it is not Python (") or told == "it has no Layer.__init__"
