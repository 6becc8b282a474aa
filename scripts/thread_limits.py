"""No more threads than processors, whatever the environment asks for: with very many OpenMP ends the process.

MKL, in most builds of torch for x86, bounds them by itself, unless ``MKL_DYNAMIC`` is false; elsewhere nothing does.
Standard library and torch only.
"""

import os
from collections.abc import Mapping

#: Where the environment asks for threads.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def processors() -> int:
    """Processors of the machine; a program that may use a part of them can have as many threads all the same."""
    return os.cpu_count() or 1


def bounded(environ: Mapping[str, str]) -> dict[str, str]:
    """What a program should find in those of :data:`VARIABLES` that ask for more threads than there are processors."""
    most = processors()
    # OpenMP takes a list too, a number for each level of nesting; what is no number it ignores.
    first = {name: environ.get(name, "").partition(",")[0].strip().lstrip("+0") for name in VARIABLES}
    # Python refuses to read a number of thousands of digits.
    asks = {name: number for name, number in first.items() if number.isascii() and number.isdecimal()}
    return {name: str(most) for name, number in asks.items() if len(number) > 9 or int(number) > most}


def bound_torch() -> str | None:
    """Have torch use no more threads than there are processors; to be called before it computes anything.

    Returns:
        A note on that, in one line; None if torch would not use more.
    """
    import torch

    asked, most = torch.get_num_threads(), processors()
    if asked <= most:
        return None
    torch.set_num_threads(most)
    said = " and ".join(name for name in bounded(os.environ)) or "the environment"
    return f"{said} asked for {asked:,} threads, and this machine has {most} processors: {most} threads are used"
