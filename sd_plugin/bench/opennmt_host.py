"""OpenNMT-py's own translator, stock and as this library's patch makes it; needs OpenNMT-py to be installed."""

from __future__ import annotations

import contextlib
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._environment import read_switch
from ..cell import SteppedDropout
from ..loss import FusedCrossEntropyLoss
from ..lstm import StructuredDropoutLSTM
from ..patches import opennmt as patch
from ..patterns import Case, draw
from .columns import DENSE, NR_ST, STOCK
from .layers import DenseLinear

if TYPE_CHECKING:
    from torch import Tensor

    from .opennmt import Sizes


@lru_cache
def version() -> str | None:
    """The version of the installed OpenNMT-py; None where there is none that the patch supports."""
    try:
        with warnings.catch_warnings():
            # On a modern torch the host's import tells a dozen deprecations, which nobody here can act on.
            warnings.simplefilter("ignore", FutureWarning)
            import onmt.model_builder
    except Exception:  # a host that cannot be imported, for whatever reason, is not there
        return None
    found = getattr(onmt, "__version__", None)
    return found if found in patch.VERSIONS else None


@contextlib.contextmanager
def _patched(active: bool) -> Iterator[None]:
    """The host with this library's types, or as it is; afterwards as the environment wants it."""
    if active:
        patch.enable(replace=False)
    else:
        patch.disable()
    try:
        yield
    finally:
        switch = read_switch(os.environ)
        if switch.enabled:
            patch.enable(replace=switch.replace, mode=switch.mode)
        else:
            patch.disable()


def _options(sizes: Sizes, p: float, **types: Any) -> Namespace:
    """Model options as ``onmt_train`` would have them after parsing and validation."""
    import onmt.opts
    from onmt.utils.parse import ArgumentParser

    opt = ArgumentParser.defaults(onmt.opts.model_opts)
    opt.__dict__.update(
        rnn_type="LSTM",
        layers=sizes.layers,
        hidden_size=sizes.hidden,
        word_vec_size=sizes.word_vector,
        input_feed=1,
        global_attention="general",
        dropout=[p],
        attention_dropout=[0.0],
        optim="sgd",
        update_vocab=False,
        freeze_word_vecs_enc=False,
        freeze_word_vecs_dec=False,
        gpu_ranks=[],
        **types,
    )
    ArgumentParser.update_model_opts(opt)
    ArgumentParser.validate_model_opts(opt)
    valid: Namespace = opt
    return valid


def _vocabularies(sizes: Sizes) -> dict[str, Any]:
    from onmt.inputters.inputter import dict_to_vocabs

    def words(count: int) -> list[str]:
        return ["<unk>", "<blank>", "<s>", "</s>", *(f"w{i}" for i in range(count - 4))]

    names = {"data_task": "seq2seq", "decoder_start_token": "<s>"}
    made: dict[str, Any] = dict_to_vocabs({"src": words(sizes.source), "tgt": words(sizes.target), **names})
    return made


def _make_dense(model: Any) -> None:
    """Let a structured model drop as the stock one does, at random, on this library's kernels: nothing is skipped."""
    encoder, decoder = model.encoder, model.decoder
    for embeddings in (encoder.embeddings, decoder.embeddings):
        embeddings.dropout = nn.Dropout(embeddings.dropout.p)
    for module in (encoder.rnn, decoder.rnn):
        module.dropout_mode = "random"
    # The attention's products are part of the decoder's operation.
    DenseLinear.adopt(model.generator)

    def output_dropout(count: int, batch: int, like: Tensor, hinted: bool) -> SteppedDropout:
        shape = (count, batch, decoder.hidden_size)
        pattern = draw(Case.I, *shape, decoder.dropout.p, device=like.device, dtype=like.dtype)
        return SteppedDropout(pattern, "decoder.output")

    decoder._output_dropout = output_dropout


def build(column: str, sizes: Sizes, p: float) -> nn.Module:
    """The host's model for ``column``, built by the host itself."""
    from onmt.model_builder import build_base_model

    if column == STOCK:
        types: dict[str, Any] = {"encoder_type": "rnn", "decoder_type": "rnn"}
    else:
        types = {"encoder_type": "sd_rnn", "decoder_type": "sd_rnn", "sd_mode": NR_ST if column == DENSE else column}
    with _patched(column != STOCK):
        model: nn.Module = build_base_model(_options(sizes, p, **types), _vocabularies(sizes))
    if column == DENSE:
        _make_dense(model)
    for module in model.modules():
        if isinstance(module, StructuredDropoutLSTM):
            module.native = False
    # The host initializes all parameters so, after building (param_init).
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -sizes.init, sizes.init)
    return model.train()


class Loss:
    """The loss of a batch as ``onmt.trainer.Trainer`` computes it, its statistics included."""

    def __init__(self, column: str, model: nn.Module, sizes: Sizes, device: torch.device) -> None:
        from onmt.utils.loss import LossCompute

        vocabulary = _vocabularies(sizes)["tgt"]
        criterion = nn.CrossEntropyLoss(ignore_index=vocabulary["<blank>"], reduction="sum")
        if column != STOCK:
            FusedCrossEntropyLoss.adopt(criterion)  # as the plugin does
        self._compute = LossCompute(criterion, model.generator, vocab=vocabulary).to(device)
        self._model: Any = model

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        """Summed over words, averaged over sentences.

        Args:
            source: ``[S, B]``; target: ``[T + 1, B]``, its first word the start symbol.
        """
        src, tgt = source.t().unsqueeze(2), target.t().unsqueeze(2)
        lengths = torch.full((src.shape[0],), src.shape[1], device=src.device)
        output, attentions = self._model(src, tgt, lengths)
        batch = {"src": src, "srclen": lengths, "tgt": tgt}
        loss, _ = self._compute(batch, output, attentions, trunc_start=0, trunc_size=tgt.shape[1])
        self._model.decoder.detach_state()
        per_sentence: Tensor = loss / src.shape[0]
        return per_sentence
