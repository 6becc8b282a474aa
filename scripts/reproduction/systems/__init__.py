"""The hosts: for each a module that knows its commands and reads its files."""

from ..job import System
from .awd_lstm import AwdLstm
from .opennmt import OpenNMT
from .targer import Targer
from .zaremba import Zaremba

#: By the name that rows give it.
SYSTEMS: dict[str, System] = {
    "zaremba": Zaremba(),
    "awd_lstm": AwdLstm(),
    "opennmt": OpenNMT(),
    "targer": Targer(),
}
