"""Tells a host's source from other code of the same module name, by its text alone: nothing is imported.

A fingerprint names what a patch relies on: functions and methods with their arguments, and names that they must use.
Formatting, comments and what else a file holds do not matter, so that a checkout with edits of its own is still known,
and one whose replaced functions mean something else is not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """What is expected of one function.

    Attributes:
        arguments: their names in order, blank-separated, with ``*`` and ``**`` where they are.
        uses: names and attributes that must occur in its body.
    """

    arguments: str
    uses: frozenset[str] = frozenset()

    @classmethod
    def of(cls, arguments: str, *uses: str) -> Function:
        """``Function(arguments, frozenset(uses))``."""
        return cls(arguments, frozenset(uses))


#: Qualified name (``WeightDrop.forward``, ``embedded_dropout``) -> what is expected of it.
Fingerprint = Mapping[str, Function]


def difference(source: str, fingerprint: Fingerprint) -> str | None:
    """The first point in which ``source`` is not what ``fingerprint`` describes, in words; None if there is none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the latter two: nested too deeply
        return f"it is not Python ({error.__class__.__name__})"
    found = dict(_functions(tree, ""))
    for name, expected in fingerprint.items():
        node = found.get(name)
        if node is None:
            return f"it has no {name}"
        arguments = _arguments(node)
        if arguments != expected.arguments:
            return f"{name} takes ({arguments}), not ({expected.arguments})"
        missing = expected.uses - _names(node)
        if missing:
            return f"{name} does not use {', '.join(sorted(missing))}"
    return None


def source_of(module: ModuleType) -> str | None:
    """The source text of an imported module; None where there is none to read."""
    loader = getattr(getattr(module, "__spec__", None), "loader", None) or getattr(module, "__loader__", None)
    try:
        text: str | None = loader.get_source(module.__name__)  # type: ignore[union-attr]
    except (AttributeError, ImportError, OSError, SyntaxError):
        return None
    return text


def _functions(node: ast.AST, prefix: str) -> list[tuple[str, FunctionNode]]:
    """Functions of a module and methods of its classes, with their qualified names; the last of a name counts."""
    found: list[tuple[str, FunctionNode]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((prefix + child.name, child))
        elif isinstance(child, ast.ClassDef):
            found += _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try)):
            found += _functions(child, prefix)
    return found


def _arguments(node: FunctionNode) -> str:
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if given.vararg:
        names.append(f"*{given.vararg.arg}")
    elif given.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in given.kwonlyargs]
    if given.kwarg:
        names.append(f"**{given.kwarg.arg}")
    return " ".join(names)


def _names(node: FunctionNode) -> set[str]:
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names | {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
