"""``sd-plugin to-stock``: makes a checkpoint of ``sd_rnn`` one that OpenNMT-py reads without this plugin.

Parameters are the same ones under the same names; only the types in the saved options are ours. Needs no OpenNMT-py.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..kernels import leftovers
from . import checkpoints
from .options import check_checkpoint

_STOCK = {"sd_rnn": "rnn", "sd_brnn": "brnn"}


def to_stock(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Rename the types in the options of ``checkpoint``, in place, and drop the ``sd_*`` options; returns it.

    Raises:
        UsageError: it was written by a newer plugin, or neither its encoder nor its decoder is of this plugin.
    """
    opt = checkpoint["opt"]
    check_checkpoint(opt)
    types = {name: getattr(opt, name, None) for name in ("encoder_type", "decoder_type")}
    if not set(types.values()) & set(_STOCK):
        encoder, decoder = types.values()
        raise UsageError(f"encoder {encoder} and decoder {decoder} are OpenNMT-py's own already")
    vars(opt).update({name: _STOCK.get(str(value), value) for name, value in types.items()})
    for name in [name for name in vars(opt) if name.startswith("sd_")]:
        delattr(opt, name)
    return checkpoint


def _check_output(model: Path, output: Path, replace: bool) -> None:
    """Refuse before anything is read.

    Raises:
        UsageError: ``output`` is no name for a new file, nor one that may be replaced.
    """
    # Unlike the methods of Path, these take any name for one that may be tried.
    if os.path.isdir(output):
        raise UsageError(f"{output} is a folder: name a file")
    if not os.path.exists(output):
        return
    if os.path.exists(model) and os.path.samefile(model, output):
        raise UsageError(f"{output} is the checkpoint itself, whose sd_* options would be lost: choose another name")
    if not os.path.isfile(output):
        raise UsageError(f"{output} is no ordinary file: choose another name")
    if not replace:
        raise UsageError(f"{output} exists; --force replaces it")


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write to a temporary name in the same folder, then rename: never half a file under the final name."""
    target = Path(os.path.realpath(path))
    temporary = leftovers.partial(target)
    try:
        file = temporary.open("wb")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # torch notes at its end that the file is shorter than it should be, and tells that instead.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, Exception) and isinstance(cause, OSError):
            raise UsageError(f"cannot write {path}: {cause.strerror}") from error
        raise


def main(argv: Sequence[str]) -> int:
    """The sub-command: ``IN OUT``, and ``--force`` to replace OUT."""
    parser = argparse.ArgumentParser("sd-plugin to-stock", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint trained with sd_rnn or sd_brnn")
    parser.add_argument("output", type=Path, help="the same for OpenNMT-py alone")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    arguments = parser.parse_args(argv)
    _check_output(arguments.model, arguments.output, arguments.force)
    _save(to_stock(checkpoints.load(arguments.model, as_host=False)), arguments.output)
    return 0
