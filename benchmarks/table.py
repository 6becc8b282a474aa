#!/usr/bin/env python
"""Prints the Markdown tables of a benchmark from its JSON file, for the documents: no number is typed by hand.

python benchmarks/table.py FILE.json ... [--only steps|phases|sweeps]
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


@app.command()
def main(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.json...", help="Files of sd-plugin bench --json.")],
    only: Annotated[str | None, typer.Option(help=f"One table: of {', '.join(TABLES)}.")] = None,
) -> None:
    """Print the tables of one or more benchmark files as Markdown."""
    try:
        if only is not None and only not in TABLES:
            raise UsageError(f"--only {only!r} is not valid; valid: {', '.join(TABLES)}")
        # All are read before any is printed.
        print("\n\n".join([markdown(results.load(file), only) for file in files]))
    except UsageError as error:
        print(f"table.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
