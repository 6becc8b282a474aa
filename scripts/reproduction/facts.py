#!/usr/bin/env python
"""Prints, as JSON, what an interpreter's trainings run on and with: machine, versions, backend, precision.

python facts.py DEVICE
"""

import json
import sys

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
