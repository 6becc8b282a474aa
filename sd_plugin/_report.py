"""The report beside its table of sites: who asks for it, and what patches have left to their hosts, and why.

Patches count while torch may still be under import, so this module imports nothing of it.
"""

from __future__ import annotations

import os

from ._environment import read_report

#: (what was left, a detail of it or None) -> how often.
counts: dict[tuple[str, object], int] = {}
#: What patches that are on cannot even count, in words; empty if no patch says so.
unseen: set[str] = set()

MOST_DETAILS = 6


def is_asked_for() -> bool:
    """The environment wants the whole report at exit."""
    try:
        return read_report(os.environ)
    except ValueError:
        # Whoever sets it to something wants to see something; `sd-plugin doctor` tells what is valid.
        return True


def count(what: str, detail: object = None) -> None:
    """``what``, which reads as "calls of …", was left once more. Details are listed together."""
    key = what, detail
    counts[key] = counts.get(key, 0) + 1


def lines(dropped: bool) -> list[str]:
    """One of each, most frequent first, and what cannot be seen; none if nobody has counted or said anything.

    Args:
        dropped: some unit was, so that nothing left is good news.
    """
    totals: dict[str, int] = {}
    for (what, _), number in counts.items():
        totals[what] = totals.get(what, 0) + number
    text = ["  left as the program has it, in training:"] if totals else []
    for what, total in sorted(totals.items(), key=lambda item: -item[1]):
        text.append(f"    {what}{_details(what)}: {total:,}")
    if unseen:
        if not totals:
            none = "left as the program has it" if dropped else "called in training"
            text.append(f"  nothing of what the patch knows was {none}")
        text.append(f"  not seen, so not counted: {'; '.join(sorted(unseen))}")
    return text


def _details(what: str) -> str:
    details = sorted(str(detail) for about, detail in counts if about == what and detail is not None)
    shown = details[:MOST_DETAILS] + ["…"] * (len(details) > MOST_DETAILS)
    return f" ({', '.join(shown)})" if shown else ""
