#!/usr/bin/env python
"""Prints the Markdown tables of a benchmark from its JSON file, for the documents: no number is typed by hand.

python benchmarks/table.py FILE.json ... [--only steps|phases|sweeps] [--into README.md]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    print("table.py needs typer: pip install '.[bench]'", file=sys.stderr)
    raise SystemExit(2) from None

from sd_plugin.bench import results, summary
from sd_plugin.errors import UsageError

# One line for what is wrong with a command line, as the programs in scripts/ have it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from typer_program import run_app

BEGIN, END = "<!-- table of the benchmark: begin -->", "<!-- table of the benchmark: end -->"
TABLES = {"steps": summary.step_table, "phases": summary.phase_table, "sweeps": summary.sweep_table}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def markdown(document: results.Document, only: str | None) -> str:
    """Heading, tables and notes of one file, or one of its tables with the heading."""
    made = [make(document) for name, make in TABLES.items() if only in (None, name)]
    parts = ["  \n".join(summary.head(document))]
    parts += [f"**{table.title}**\n\n{table.markdown()}" for table in made if table.rows]
    if only is None:
        parts.append("\n".join(f"- {note}" for note in summary.notes(document)))
    return "\n\n".join(parts)


def inserted(text: str, made: str, name: str) -> str:
    """``text`` with what is between the two marks replaced by ``made``.

    Raises:
        UsageError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"--into {name}: it has no {BEGIN} and {END}")
    return f"{before}{begin}\n{made}\n{end}{after}"


@app.command()
def main(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.json...", help="Files of sd-plugin bench --json.")],
    only: Annotated[str | None, typer.Option(help=f"One table: of {', '.join(TABLES)}.")] = None,
    into: Annotated[Path | None, typer.Option(help="Put them between the marks of this document instead.")] = None,
) -> None:
    """Print the tables of one or more benchmark files as Markdown."""
    try:
        if only is not None and only not in TABLES:
            raise UsageError(f"--only {only!r} is not valid; valid: {', '.join(TABLES)}")
        # All are read before any is printed.
        made = "\n\n".join([markdown(results.load(file), only) for file in files])
        if into is None:
            print(made)
            return
        changed = inserted(into.read_text(encoding="utf-8"), made, into.name)
        temporary = into.with_name(f".{into.name}.new")
        temporary.write_text(changed, encoding="utf-8")
        temporary.replace(into)
    except OSError as error:
        print(f"table.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except UsageError as error:
        print(f"table.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    run_app(app, "table.py")
