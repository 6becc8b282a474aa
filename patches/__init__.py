"""Patches for host programs: one module per host.

A host module is named as its host is and declares `NAME` (the host's name as its users know it),
`enable(**options)` and `disable()`. If the start-up hook is to reach it, it also declares
`on_import(module)`, see `sd_plugin._autoload`. Host modules import their host inside functions only, so that
loading one neither imports the host nor runs into an import of the host that is under way.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from sd_plugin.errors import UsageError

__all__ = ["disable", "enable", "hosts"]


def hosts() -> tuple[str, ...]:
    """The names that `enable` and `disable` take, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def enable(host: str, **options: Any) -> None:
    """Makes `host` use structured dropout in this process.

    Args:
        host: one of `hosts()`.
        options: passed on to the host's own `enable`, which documents them.

    Raises:
        UsageError: `host` is unknown. What the host's own `enable` raises passes through.
    """
    _load(host).enable(**options)


def disable(host: str) -> None:
    """Gives `host` its own behaviour back.

    Args:
        host: one of `hosts()`.

    Raises:
        UsageError: `host` is unknown.
    """
    _load(host).disable()


def _load(host: str) -> Any:
    valid = hosts()
    if host not in valid:
        raise UsageError(f"unknown host {host!r}; valid: {', '.join(valid) or 'none'}")
    return importlib.import_module(f"{__name__}.{host}")
