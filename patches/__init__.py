"""Patches for host programs: one module per host.

A host module is named as its host is and declares `HOST` (see `sd_plugin.patches._host.Host`: its modules, what
versions are supported, how it is found), `enable(**options)` and `disable()`, and `on_import(module)`, which the
start-up hook calls, see `sd_plugin._autoload`. `enable` does all or nothing, and says in a UsageError why not. Host
modules import their host inside functions only, so that loading one neither imports the host nor runs into an import
of the host that is under way.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from sd_plugin.errors import UsageError

from ._host import Finding, Host

__all__ = ["Finding", "Host", "disable", "enable", "hosts", "registry"]


def hosts() -> tuple[str, ...]:
    """The names that `enable` and `disable` take, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def registry() -> dict[str, Host]:
    """What every patch module declares about its host, by name."""
    return {name: _load(name).HOST for name in hosts()}


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
