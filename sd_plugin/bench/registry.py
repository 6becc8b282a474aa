"""Every workload by its name."""

from __future__ import annotations

from . import awd_lstm, ner, opennmt, zaremba
from .workload import Workload

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (*zaremba.WORKLOADS, *awd_lstm.WORKLOADS, *opennmt.WORKLOADS, *ner.WORKLOADS)
}
#: Workloads whose stock model can come from a checkout (``--host NAME=DIR``).
HOSTS = (awd_lstm.NAME,)
