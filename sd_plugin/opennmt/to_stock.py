"""``sd-plugin to-stock``: makes a checkpoint of ``sd_rnn`` one that OpenNMT-py reads without this plugin.

Parameters are the same ones under the same names; only the types in the saved options are ours.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from .options import check_checkpoint

_STOCK = {"sd_rnn": "rnn", "sd_brnn": "brnn"}


def to_stock(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Rename the types in the options of ``checkpoint``, in place, and drop the ``sd_*`` options; returns it.

    Raises:
        UsageError: it was written by a newer plugin, or neither its encoder nor its decoder is of this plugin.
    """
    opt = checkpoint["opt"]
    check_checkpoint(opt)
    if opt.encoder_type not in _STOCK and opt.decoder_type not in _STOCK:
        raise UsageError(f"encoder {opt.encoder_type} and decoder {opt.decoder_type} are OpenNMT-py's own already")
    opt.encoder_type = _STOCK.get(opt.encoder_type, opt.encoder_type)
    opt.decoder_type = _STOCK.get(opt.decoder_type, opt.decoder_type)
    for name in [name for name in vars(opt) if name.startswith("sd_")]:
        delattr(opt, name)
    return checkpoint


def _load(path: Path) -> dict[str, Any]:
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        checkpoint = torch.load(path, map_location="cpu")
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except Exception as error:
        raise UsageError(f"{path} is not a checkpoint that torch can load ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("opt"), argparse.Namespace):
        raise UsageError(f"{path} is not a checkpoint of OpenNMT-py")
    return checkpoint


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write to a temporary name in the same folder, then rename: never half a file under the final name."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"cannot write in {path.parent}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def main(argv: Sequence[str]) -> int:
    """The sub-command: ``IN OUT``, and ``--force`` to replace OUT."""
    parser = argparse.ArgumentParser("sd-plugin to-stock", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint trained with sd_rnn or sd_brnn")
    parser.add_argument("output", type=Path, help="the same for OpenNMT-py alone")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not arguments.force:
        raise UsageError(f"{arguments.output} exists; --force replaces it")
    _save(to_stock(_load(arguments.model)), arguments.output)
    return 0
