"""What ``gpu_check.py`` finds, part by part: collected, printed at once, and kept in a file that a person can read."""

import contextlib
import json
import math
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd_plugin.bench.folders import without_folders

KIND = "sd-plugin gpu check"
SCHEMA = 1
#: Exit status of a section's process that cannot go on, but whose next parts a new process can do.
BROKEN = 3
#: Seconds that a part may run on after its time is over.
GRACE = 15.0
#: Seconds in which a part should be done that says nothing else.
LIMIT = 60.0
_DIGITS = 4
_LINE = 116


def rounded(value: Any) -> Any:
    """Numbers with as many digits as say something, what JSON has no number for as text; no folders of the machine."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return float(f"{value:.{_DIGITS}g}") if abs(value) < 10**_DIGITS else round(value)
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, Mapping):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value


def written(value: Any, indent: int = 0) -> str:
    """JSON in which what fits into a line is one, and short entries share lines."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or len(line) + indent <= _LINE:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {written(part, indent + 1)}" for key, part in value.items()]
        plain = not any(isinstance(part, (dict, list)) for part in value.values())
    else:
        parts, plain = [written(part, indent + 1) for part in value], False
    lines = [parts[0]]
    for part in parts[1:]:
        if plain and len(lines[-1]) + len(part) + indent < _LINE:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    inner, outer, (opening, closing) = " " * (indent + 1), " " * indent, "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{outer}{closing}"


def save(value: Any, path: Path) -> None:
    """Under a temporary name first: ``path`` never holds half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(written(value) + "\n")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def one_line(error: BaseException) -> str:
    """The last line of its traceback, cut where nobody reads on."""
    lines = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()
    # A message of many lines begins with what matters.
    return (lines[0] if len(lines) > 1 else lines[-1])[:300]


def failed(part: Any) -> bool:
    """It could not be measured, or what it checked is not right."""
    return isinstance(part, Mapping) and bool(part.get("error") or part.get("failed"))


class BrokenError(RuntimeError):
    """The device can do nothing more in this process."""


class Section:
    """The parts of a section; each is measured by itself, and one that fails leaves the others alone.

    Args:
        seconds: how long the section may take.
        keep: called with all parts after each change.
        parts: what is there already, from a process that ended early.
        is_broken: asked after an error.
        isolated: the section has a process of its own, which ends if a part hangs.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        keep: Callable[[dict[str, Any]], object] = lambda parts: None,
        parts: Mapping[str, Any] | None = None,
        is_broken: Callable[[], bool] = lambda: False,
        isolated: bool = False,
    ) -> None:
        self.name = name
        self.parts: dict[str, Any] = dict(parts or {})
        self._end = time.monotonic() + seconds
        self._keep, self._is_broken, self._isolated = keep, is_broken, isolated

    def left(self) -> float:
        """Seconds left of the section's time."""
        return self._end - time.monotonic()

    def part(self, name: str, run: Callable[[], Any], at_least: float = 1.0, limit: float = LIMIT) -> Any:
        """Measure a part, unless it is there or fewer than ``at_least`` seconds are left.

        Args:
            limit: seconds after which it does not end any more.

        Raises:
            BrokenError: it failed so that nothing else can be done.
        """
        if name in self.parts:
            return self.parts[name]
        if self.left() < at_least:
            return self._store(name, {"skipped": f"no time left ({max(0.0, self.left()):.0f} s, needs {at_least:g})"})
        self.parts[name] = {"running": True}
        self._keep(self.parts)
        start = time.monotonic()
        with self._watched(name, limit):
            try:
                found = run()
            except Exception as caught:  # every part is worth having without the others
                found = {"error": one_line(caught)}
                traceback.print_exception(caught, limit=-3)
        self._store(name, found, time.monotonic() - start)
        if failed(found) and self._is_broken():
            raise BrokenError(name)
        return self.parts[name]

    def _store(self, name: str, found: Any, seconds: float | None = None) -> Any:
        self.parts[name] = rounded(found)
        self._keep(self.parts)
        took = "" if seconds is None else f" ({seconds:.1f} s)"
        print(f"{self.name} / {name}{took}: {written(self.parts[name])}", flush=True)
        return self.parts[name]

    @contextlib.contextmanager
    def _watched(self, name: str, limit: float) -> Iterator[None]:
        """Ends the process if what is inside takes too long: a kernel whose blocks wait for each other never ends."""
        if not self._isolated:
            yield
            return
        limit = max(1.0, min(limit, self.left())) + GRACE

        def end() -> None:
            self._store(name, {"error": f"it did not end within {limit:.0f} s"})
            os._exit(BROKEN)

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def failures(document: Mapping[str, Any]) -> list[str]:
    """``section / part`` of everything that failed."""
    found = []
    for name, section in document["sections"].items():
        if section.get("error"):
            found.append(name)
        found += [f"{name} / {part}" for part, result in section.get("parts", {}).items() if failed(result)]
    return found


def table(heading: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; the first column to the left."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _layers(parts: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of the table of LSTM layers: every shape and precision, forward and both ways."""
    ways = ("stock nn.LSTM", "our layer, auto, dense", "our layer, auto, skipping")
    # What could not be measured has a sentence instead of times.
    measured = {
        way: {name: times for name, times in parts.get(way, {}).items() if isinstance(times, Mapping)} for way in ways
    }
    names = dict.fromkeys(name for times in measured.values() for name in times if " " in name)
    return [
        [name, *(measured[way].get(name, {}).get(key, "-") for key in ("forward", "both") for way in ways)]
        for name in names
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of a check, made of its file alone."""
    machine, sections = document["machine"], document["sections"]
    commit = (document.get("git") or {}).get("commit") or "no commit"
    lines = [
        f"{machine.get('gpu') or machine['cpu']}, driver {machine.get('driver')}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
        + f"; commit {commit[:10]}; {document['date']}."
    ]
    if document["rehearsal"]:
        lines.insert(0, "**A rehearsal on a CPU with small shapes: these are no results.**")
    if wrong := failures(document):
        lines.append("**Failed:** " + "; ".join(wrong) + ".")
    for name, section in sections.items():
        for part, result in section.get("parts", {}).items():
            if isinstance(result, Mapping) and result.get("skipped"):
                lines.append(f"Skipped: {name} / {part}: {result['skipped']}.")

    checks = [
        [part, result.get("cases", "-"), result.get("tolerance", "-"), max(result["worst"].values(), default="-"),
         "no" if failed(result) else "yes"]
        for part, result in sections.get("correctness", {}).get("parts", {}).items()
        if isinstance(result, Mapping) and isinstance(result.get("worst"), Mapping)
    ]  # fmt: skip
    if checks:
        heading = ["against float64", "cases", "tolerance", "largest error, relative", "within"]
        lines += ["**Correctness**", table(heading, checks)]
    micro = sections.get("micro", {}).get("parts", {})
    if rows := _layers(micro):
        heading = ["µs per layer and step", *(f"{key}, {way}" for key in ("forward", "both ways")
                   for way in ("stock", "ours dense", "ours skipping"))]  # fmt: skip
        lines += ["**LSTM layers**", table(heading, rows)]
    suggested = micro.get("thresholds", {}).get("suggested")
    if suggested:
        rows = [[name, *values.values()] for name, values in suggested.items()]
        lines += [
            "**Largest kept fraction at which skipping beats cuBLAS**",
            table(["precision", "FP", "BP", "WG"], rows),
        ]
    targets = sections.get("steps", {}).get("parts", {}).get("targets")
    if isinstance(targets, Mapping) and not failed(targets):
        heading = ["workload", "ours, dense", "NR+RH+ST", "target", "met"]
        rows = [[name, *(row.get(key, "-") for key in ("dense", "ratio", "target", "met"))]
                for name, row in targets.items() if isinstance(row, Mapping)]  # fmt: skip
        lines += ["**Whole steps, to stock in fp32+TF32**", table(heading, rows)]
    return "\n\n".join(lines) + "\n"
