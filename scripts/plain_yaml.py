"""Plain values of a YAML text, whoever wrote it: what is wrong is told in one line, and its size is bounded."""

from pathlib import Path
from typing import Any

import yaml
from user_input import in_one_line, shortened, shown

from sd_plugin.errors import UsageError

#: A file of settings has some dozens of lines, and hardly a value in a value.
FILE_BYTES, DEPTH = 1 << 20, 20


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can stand for more values than any memory holds; and not deep."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)
        if self.depth == DEPTH:
            problem = f"more than {DEPTH} values in each other are not read"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
            # A date with a thirteenth month, a number of too many digits, a tag that does not fit its value.
            kind = node.tag.rpartition(":")[2]
            value = shown(node.value) if isinstance(node.value, str) else "this"
            problem = f"{value} cannot be read as {shortened(kind, 20)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        UsageError: what is wrong with it, and where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(in_one_line(f"{place}{error.problem or error.context}", 200)) from None
    except yaml.YAMLError as error:
        raise UsageError(in_one_line(str(error), 200)) from None


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        UsageError: it is no YAML. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(FILE_BYTES + 1)
    if len(content) > FILE_BYTES:
        raise UsageError(f"{shortened(str(path))} is no file of settings: it is larger than {FILE_BYTES:,} bytes")
    try:
        return parse_yaml(content.decode())
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
    except UsageError as error:
        reason = str(error)
    raise UsageError(f"{shortened(str(path))} is not YAML: {reason}")
