"""OpenNMT-py's RNN encoder with structured dropout."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from onmt.encoders.rnn_encoder import RNNEncoder
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import hints
from ..kernels import Steps
from ..lstm import StructuredDropoutLSTM
from .embeddings import structure_embeddings, update_embeddings
from .options import Settings, is_ours, resolve

if TYPE_CHECKING:
    from torch import Tensor


class StructuredRNNEncoder(RNNEncoder):
    """``onmt.encoders.RNNEncoder`` whose embedding, inter-layer, recurrent and output dropouts are structured.

    Parameter names, shapes, outputs and options are the stock encoder's; ``rnn_type`` is LSTM.

    Args:
        settings: what the ``sd_*`` options come to.
        output_is_multiplied: the decoder multiplies the encoder's output by a weight and can skip there.
        *args, **kwargs: of ``RNNEncoder``.
    """

    rnn: Any

    def __init__(self, settings: Settings, output_is_multiplied: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.output_is_multiplied = output_is_multiplied
        StructuredDropoutLSTM.adopt(self.rnn, mode=settings.mode, sampling=settings.sampling, site="encoder.rnn")
        structure_embeddings(self.embeddings, settings.sampling, "encoder.embeddings")
        self.update_dropout(self.rnn.dropout)

    @classmethod
    def from_opt(cls, opt: Namespace, embeddings: Any) -> RNNEncoder:
        """The encoder that ``opt`` asks for; the stock one where nothing is structured.

        Raises:
            UsageError: the ``sd_*`` options are not valid, or ``sd_rnn`` was asked of another RNN than the LSTM.
        """
        # OpenNMT-py derives this from its own names only, and the decoder reads it later.
        opt.brnn = opt.encoder_type in ("brnn", "sd_brnn")
        if not is_ours(opt.encoder_type, opt.rnn_type):
            return RNNEncoder.from_opt(opt, embeddings)
        settings = resolve(opt)
        if settings.mode == "random":
            return RNNEncoder.from_opt(opt, embeddings)
        return cls(
            settings,
            # Only this attention multiplies the encoder's output by a weight.
            opt.global_attention == "mlp" and is_ours(opt.decoder_type, opt.rnn_type),
            rnn_type=opt.rnn_type,
            bidirectional=opt.brnn,
            num_layers=opt.enc_layers,
            hidden_size=opt.enc_hid_size,
            dropout=opt.dropout[0] if isinstance(opt.dropout, list) else opt.dropout,
            embeddings=embeddings,
            use_bridge=opt.bridge,
        )

    def forward(self, src: Tensor, src_len: Tensor | None = None) -> tuple[Tensor, Any, Tensor | None]:
        """See ``onmt.encoders.EncoderBase.forward``; hints pass through packing and padding."""
        emb = self.embeddings(src)
        if src_len is None:
            enc_out, enc_final_hs = self.rnn(emb)
        else:
            packed = pack_padded_sequence(emb, src_len.view(-1).tolist(), batch_first=True, enforce_sorted=False)
            steps = Steps.packed(packed.batch_sizes.tolist())
            hints.carry(emb, Steps(1), packed.data, steps)
            packed_out, enc_final_hs = self.rnn(packed)
            enc_out = pad_packed_sequence(packed_out, batch_first=True)[0]
            hints.carry(packed_out.data, steps, enc_out, Steps(1))
        if not self.output_is_multiplied:
            hints.waive(enc_out)
        if self.use_bridge:
            enc_final_hs = self._bridge(enc_final_hs)
        return enc_out, enc_final_hs, src_len

    @property
    def current_dropout(self) -> float:
        """The dropout that its sites follow now."""
        return float(self.rnn.dropout)

    def update_dropout(self, dropout: float, attention_dropout: float | None = None) -> None:
        """Set the dropout of every site that follows ``dropout``, the embeddings included."""
        self.rnn.dropout = dropout
        self.rnn.recurrent_dropout = self.settings.recurrent_dropout(dropout)
        self.rnn.output_dropout = self.settings.output_dropout(dropout)
        update_embeddings(self.embeddings, dropout)

    def _to_stock(self) -> None:
        # For `sd_plugin.to_stock`, which changes the modules inside by themselves.
        self.__class__ = RNNEncoder
        del self.settings, self.output_is_multiplied
