"""What was dropped, and what the products skipped because of it: counters per dropout site, and their report."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .kernels import fallbacks

if TYPE_CHECKING:
    from .kernels import Kept

#: First words of the report, for whoever looks for it in a log.
TITLE = "sd-plugin: structured dropout report"
REPORT_VARIABLE = "SD_PLUGIN_REPORT"


@dataclass
class Site:
    """Counters of one place where units are dropped.

    Attributes:
        drawn: patterns drawn; used: those that reached a product which could skip; waived: those that no
            product with a weight follows.
        units, dropped: units over all steps, and how many of them were dropped.
        dense, skipped: multiply-adds of the products fed from here (FP, BP, WG), and how many were left out.
    """

    drawn: int = 0
    used: int = 0
    waived: int = 0
    units: int = 0
    dropped: int = 0
    dense: int = 0
    skipped: int = 0

    @property
    def lost(self) -> int:
        """Patterns whose tensor reached no product that could skip."""
        return self.drawn - self.used - self.waived


_sites: dict[str, Site] = {}
_backends: set[str] = set()
#: Patterns drawn when the report was last made; None if it was not.
_told: int | None = None
_registered = False


def sites() -> dict[str, Site]:
    """The live counters by site name, in order of first use."""
    return _sites


def reset() -> None:
    """Forget everything counted so far, kernel fallbacks included."""
    global _told
    _sites.clear()
    _backends.clear()
    fallbacks.clear()
    _told = None


def count_draw(site: str, kept: Kept) -> None:
    """A pattern was drawn at ``site``."""
    global _registered
    if not _registered:
        atexit.register(_at_exit)
        _registered = True
    counters = _sites.setdefault(site, Site())
    counters.drawn += 1
    counters.units += kept.steps * kept.size
    # Padded rows differ in length; counting them would wait for the device, so their expectation stands for them.
    width = round(kept.size / kept.scale) if kept.padded else kept.width
    counters.dropped += kept.steps * (kept.size - width)


def count_use(site: str) -> None:
    """A pattern of ``site`` reached its first product."""
    _sites.setdefault(site, Site()).used += 1


def count_waived(site: str) -> None:
    """A pattern of ``site`` is followed by no product with a weight."""
    _sites.setdefault(site, Site()).waived += 1


def count_product(site: str, kept: Kept, rows: int, columns: int, backend: str) -> None:
    """A product of ``rows`` activations with ``[kept.size, columns]`` weights visited the kept units only."""
    counters = _sites.setdefault(site, Site())
    counters.dense += rows * columns * kept.size
    counters.skipped += rows * columns * (kept.size - kept.width)
    _backends.add(backend)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def lines() -> list[str]:
    """The report, a line each; the first starts with :data:`TITLE`."""
    if not _sites:
        return [f"{TITLE}: no unit was dropped"]
    table = [("site", "patterns", "units dropped", "multiply-adds skipped", "no product follows", "hints lost")]
    for name, site in _sites.items():
        dropped, skipped = _percent(site.dropped, site.units), _percent(site.skipped, site.dense)
        table.append((name, str(site.drawn), dropped, skipped, str(site.waived), str(site.lost)))
    total_dense = sum(site.dense for site in _sites.values())
    total_skipped = sum(site.skipped for site in _sites.values())
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text = [f"{TITLE} (backend: {', '.join(sorted(_backends)) or 'none used'})"]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        text.append("  " + "  ".join(cells))
    unit, name = next(((u, n) for u, n in ((1e9, "G"), (1e6, "M")) if total_dense >= u), (1e3, "k"))
    text.append(
        f"  {total_skipped / unit:.2f} of {total_dense / unit:.2f} {name} multiply-adds of these products skipped "
        f"({_percent(total_skipped, total_dense)})"
    )
    for (operation, backend, reason), count in fallbacks.items():
        text.append(f"  {count} calls of {operation} passed over backend {backend}: {reason}")
    return text


def report() -> str:
    """The report as one text; printing it is up to the caller. It is repeated at exit only if it then says more."""
    global _told
    _told = _drawn()
    return "\n".join(lines())


def _drawn() -> int:
    return sum(site.drawn for site in _sites.values())


def _at_exit() -> None:
    """The whole report when asked for by ``SD_PLUGIN_REPORT=1``, else one line if something took the slow path."""
    if not _sites or _told == _drawn():
        return
    if os.environ.get(REPORT_VARIABLE, "") not in ("", "0"):
        print(report(), file=sys.stderr)
        return
    lost = {name: site for name, site in _sites.items() if site.lost}
    if lost or fallbacks:
        told = ", ".join(f"{name} {site.lost} of {site.drawn}" for name, site in lost.items()) or "no hint lost"
        print(
            f"sd-plugin: slow path taken: dropped tensors that reached no skipping product: {told}; "
            f"backend fallbacks: {sum(fallbacks.values())} ({REPORT_VARIABLE}=1 prints all counters)",
            file=sys.stderr,
        )
