#!/usr/bin/env python
"""Prints, as JSON, what an interpreter's trainings run on and with: machine, versions, backend, precision.

python facts.py DEVICE
"""

import json
import sys
from pathlib import Path

if not __package__:
    # As a program: its siblings are in the folder above. This one's modules have names that other libraries import.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from sd_plugin.bench import machine
from sd_plugin.bench.columns import DEFAULT_PRECISIONS


def facts(device: torch.device) -> dict[str, object]:
    """Of this interpreter; the machine without what changes from minute to minute."""
    kept = {name: value for name, value in machine.machine(device).items() if name != "load_average"}
    return {
        "machine": {name: value for name, value in kept.items() if value is not None},
        "versions": machine.versions(),
        "backend": machine.backend(device)["name"],
        # No row asks for another precision than torch's own.
        "precision": DEFAULT_PRECISIONS[device.type][0],
    }


if __name__ == "__main__":
    print(json.dumps(facts(torch.device(sys.argv[1]))))
