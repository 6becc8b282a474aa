"""What this torch's ``torch.load`` does when it is not told."""

from __future__ import annotations

import torch


def is_default() -> bool:
    """It loads tensors and plain containers only, as from torch 2.6 on."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 6)
