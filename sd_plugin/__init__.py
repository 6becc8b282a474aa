"""Structured dropout for LSTM training that leaves out the products of dropped units.

The public names are loaded on first use. The start-up hook imports this package in every interpreter of the
environment, so it must stay free of imports beyond the standard library, and nearly free of those.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "Case": "sd_plugin.patterns",
    "FusedCrossEntropyLoss": "sd_plugin.loss",
    "StackedStructuredLSTM": "sd_plugin.cell",
    "StructuredDropout": "sd_plugin.dropout",
    "StructuredDropoutLSTM": "sd_plugin.lstm",
    "StructuredLinear": "sd_plugin.linear",
    "UsageError": "sd_plugin.errors",
    "convert": "sd_plugin.convert",
    "disable": "sd_plugin.patches",
    "draw_kept": "sd_plugin.patterns",
    "draw_mask": "sd_plugin.patterns",
    "enable": "sd_plugin.patches",
    "report": "sd_plugin.stats",
    "to_stock": "sd_plugin.convert",
}

if TYPE_CHECKING:
    from sd_plugin.cell import StackedStructuredLSTM
    from sd_plugin.convert import convert, to_stock
    from sd_plugin.dropout import StructuredDropout
    from sd_plugin.errors import UsageError
    from sd_plugin.linear import StructuredLinear
    from sd_plugin.loss import FusedCrossEntropyLoss
    from sd_plugin.lstm import StructuredDropoutLSTM
    from sd_plugin.patches import disable, enable
    from sd_plugin.patterns import Case, draw_kept, draw_mask
    from sd_plugin.stats import report

__all__ = [
    "Case",
    "FusedCrossEntropyLoss",
    "StackedStructuredLSTM",
    "StructuredDropout",
    "StructuredDropoutLSTM",
    "StructuredLinear",
    "UsageError",
    "__version__",
    "convert",
    "disable",
    "draw_kept",
    "draw_mask",
    "enable",
    "report",
    "to_stock",
]


def __getattr__(name: str) -> "Any":
    module_name = _EXPORTS.get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module_name), name)
    globals()[name] = value
    return value


def __dir__() -> "list[str]":
    return sorted({*globals(), *_EXPORTS})


class _Package(type(sys)):  # type: ignore[misc]
    """This package's own type, which keeps a public name from being shadowed by a sub-module of that name.

    The import system binds every sub-module as an attribute of its package once it is loaded: after any
    import of `sd_plugin.convert`, `sd_plugin.convert(model)` would otherwise call a module.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _EXPORTS and isinstance(value, type(sys)):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
