"""The dropout of OpenNMT-py's embeddings, made structured in place."""

from __future__ import annotations

from typing import Any

from ..dropout import StructuredDropout


def structure_embeddings(embeddings: Any, sampling: str, site: str) -> None:
    """Let ``onmt.modules.Embeddings`` drop whole units per time step.

    Its own class and parameters stay: only its ``dropout`` module is replaced.
    """
    embeddings.dropout = StructuredDropout(embeddings.dropout.p, batch_first=True, sampling=sampling, site=site)


def update_embeddings(embeddings: Any, dropout: float) -> None:
    """Set the embeddings' dropout, also when it was 0 before.

    The stock module reads ``dropout_p`` to decide whether to drop at all and never updates it, so a schedule that
    starts at 0 would stay off.
    """
    embeddings.update_dropout(dropout)
    embeddings.dropout_p = dropout
