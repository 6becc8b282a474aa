"""Structured dropout for OpenNMT-py 3.5: its RNN encoder and decoders, built on the host's own classes.

Imports OpenNMT-py; :mod:`sd_plugin.patches.opennmt` decides when.
"""

from .decoder import StructuredInputFeedRNNDecoder, StructuredRNNDecoder, StructuredStdRNNDecoder
from .encoder import StructuredRNNEncoder

__all__ = [
    "StructuredInputFeedRNNDecoder",
    "StructuredRNNDecoder",
    "StructuredRNNEncoder",
    "StructuredStdRNNDecoder",
]
