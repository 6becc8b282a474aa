"""Structured dropout for OpenNMT-py 3.5: its RNN encoder and decoders, built on the host's own classes.

Their modules import OpenNMT-py; :mod:`sd_plugin.patches.opennmt` decides when. Asking this package for a class imports
them, and nothing else does: what works on checkpoints alone needs no host, and does not wait for one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "StructuredInputFeedRNNDecoder",
    "StructuredRNNDecoder",
    "StructuredRNNEncoder",
    "StructuredStdRNNDecoder",
]

if TYPE_CHECKING:
    from .decoder import StructuredInputFeedRNNDecoder, StructuredRNNDecoder, StructuredStdRNNDecoder
    from .encoder import StructuredRNNEncoder


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        # First: importing the host tells the start-up hook, whose patch imports the modules below. None of them may be
        # half initialised then.
        import_module("onmt")
    except ImportError as error:
        raise ImportError(f"{name} needs OpenNMT-py: {error}") from error
    return getattr(import_module(".encoder" if name.endswith("Encoder") else ".decoder", __name__), name)
