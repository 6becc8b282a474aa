"""Structured dropout for OpenNMT-py 3.5: its RNN encoder and decoders, built on the host's own classes.

Imports OpenNMT-py; :mod:`sd_plugin.patches.opennmt` decides when.
"""

# First: importing the host tells the start-up hook, whose patch imports the modules below while this package, but
# none of them, is half initialised.
import onmt  # noqa: F401

from .decoder import StructuredInputFeedRNNDecoder, StructuredRNNDecoder, StructuredStdRNNDecoder
from .encoder import StructuredRNNEncoder

__all__ = [
    "StructuredInputFeedRNNDecoder",
    "StructuredRNNDecoder",
    "StructuredRNNEncoder",
    "StructuredStdRNNDecoder",
]
