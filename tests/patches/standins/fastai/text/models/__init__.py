"""Stand-in: importing any of its modules imports ``core`` first, as in fastai."""

from .core import *  # noqa: F403

from .awdlstm import *  # noqa: F403  # isort: skip
