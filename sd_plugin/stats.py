"""What was dropped, and what the products skipped because of it: counters per dropout site, and their report."""

from __future__ import annotations

import atexit
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _report
from ._environment import REPORT_VARIABLE
from .kernels import fallbacks

if TYPE_CHECKING:
    from .kernels import Kept

#: First words of the report, for whoever looks for it in a log.
TITLE = "sd-plugin: structured dropout report"
MOST_PAIRS = 6


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
#: Units of a layer -> how many of them exact sampling has kept at each step.
_kept: dict[int, set[int]] = {}
#: What had been counted when the report was last made; None if it was not.
_told: tuple[int, int] | None = None
_registered = False


def sites() -> dict[str, Site]:
    """The live counters by site name, in order of first use."""
    return _sites


def reset() -> None:
    """Forget everything counted so far, kernel fallbacks and what patches have left alone included."""
    global _told
    _sites.clear()
    _kept.clear()
    _report.counts.clear()
    _backends.clear()
    fallbacks.clear()
    _told = None


def count_draw(site: str, kept: Kept) -> None:
    """A pattern was drawn at ``site``."""
    global _registered
    if not _registered:
        atexit.register(tell_at_exit)
        _registered = True
    counters = _sites.setdefault(site, Site())
    counters.drawn += 1
    counters.units += kept.steps * kept.size
    # Padded rows differ in length; counting them would wait for the device, so their expectation stands for them.
    if kept.padded:
        width = round(kept.size / kept.scale)
    else:
        width = kept.width
        _kept.setdefault(kept.size, set()).add(width)
    counters.dropped += kept.steps * (kept.size - width)


def count_use(site: str) -> None:
    """A pattern of ``site`` reached its first product."""
    _sites.setdefault(site, Site()).used += 1


def count_waived(site: str, count: int = 1) -> None:
    """``count`` patterns of ``site`` are followed by no product with a weight, or by one too small to gain."""
    _sites.setdefault(site, Site()).waived += count


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
    head = _table() if _sites else [f"{TITLE}: no unit was dropped"]
    for (operation, backend, reason), count in fallbacks.items():
        head.append(f"  {count} calls of {operation} passed over backend {backend}: {reason}")
    return [*head, *_report.lines(dropped=bool(_sites))]


def _table() -> list[str]:
    """The title, a row per site, and what they come to."""
    table = [("site", "patterns", "units dropped", "multiply-adds skipped", "nothing to gain", "hints lost")]
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
    if _kept:
        text.append(f"  {_about_sampling()}")
    return text


def _about_sampling() -> str:
    """Why "units dropped" is not the probability that the program names."""
    pairs = [f"{kept} of {size}" for size in sorted(_kept) for kept in sorted(_kept[size])]
    shown = pairs[:MOST_PAIRS] + ["…"] * (len(pairs) > MOST_PAIRS)
    return (
        '"units dropped" is as near to p as whole units allow: round((1 - p) · H) of H are kept at every step, '
        f"here {', '.join(shown)}"
    )


def report() -> str:
    """The report as one text; printing it is up to the caller. It is repeated at exit only if it then says more."""
    global _told
    _told = _counted()
    return "\n".join(lines())


def _counted() -> tuple[int, int]:
    return sum(site.drawn for site in _sites.values()), sum(_report.counts.values())


def tell_at_exit() -> None:
    """The whole report when asked for by ``SD_PLUGIN_REPORT=1``, else one line if something took the slow path.

    Called when something was dropped, or a patch is on that may have found nothing to drop.
    """
    if _told == _counted():
        return
    if _report.is_asked_for():
        if any(_counted()) or (_report.unseen and not _is_child()):
            print(report(), file=sys.stderr)
        return
    lost = {name: site for name, site in _sites.items() if site.lost}
    if lost or (fallbacks and _sites):
        told = ", ".join(f"{name} {site.lost} of {site.drawn}" for name, site in lost.items()) or "no hint lost"
        print(
            f"sd-plugin: slow path taken: dropped tensors that reached no skipping product: {told}; "
            f"backend fallbacks: {sum(fallbacks.values())} ({REPORT_VARIABLE}=1 prints all counters)",
            file=sys.stderr,
        )


def _is_child() -> bool:
    """A process that a program of several has started, such as a data loader's, and that need not report on nothing."""
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and processes.parent_process() is not None
