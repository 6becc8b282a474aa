"""Structured dropout for OpenNMT-py 3.5: its RNN encoder and decoders, built on the host's own classes.

Imports OpenNMT-py; :mod:`sd_plugin.patches.opennmt` decides when. Where that is not installed, what works on
checkpoints alone still does.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

__all__ = [
    "StructuredInputFeedRNNDecoder",
    "StructuredRNNDecoder",
    "StructuredRNNEncoder",
    "StructuredStdRNNDecoder",
]

with warnings.catch_warnings():
    # On a modern torch the host tells a dozen deprecations, which would hide the one line of `sd-plugin to-stock`.
    warnings.simplefilter("ignore", FutureWarning)
    # First: importing the host tells the start-up hook, whose patch imports the modules below while this package, but
    # none of them, is half initialised.
    try:
        import onmt
    except ImportError as _error:
        onmt = None
        _problem = str(_error)

    if TYPE_CHECKING or onmt is not None:
        from .decoder import StructuredInputFeedRNNDecoder, StructuredRNNDecoder, StructuredStdRNNDecoder
        from .encoder import StructuredRNNEncoder
    else:

        def __getattr__(name: str) -> Any:
            if name in __all__:
                raise ImportError(f"{name} needs OpenNMT-py: {_problem}")
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
