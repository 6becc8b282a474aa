"""OpenNMT-py's RNN decoders with structured dropout."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch
from onmt.decoders.decoder import DecoderBase, InputFeedRNNDecoder, RNNDecoderBase, StdRNNDecoder
from onmt.modules import GlobalAttention

from .. import hints
from ..attentional import attentional_decoder, is_available
from ..cell import StackedStructuredLSTM, SteppedDropout
from ..dropout import StructuredDropout
from ..errors import UsageError
from ..kernels import Steps
from ..linear import StructuredLinear
from ..lstm import StructuredDropoutLSTM
from ..patterns import Case, draw
from .embeddings import structure_embeddings, update_embeddings
from .options import Settings, is_ours, resolve

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_FIRST = Steps(1)


def _waive_output(module: torch.nn.Module, arguments: Any, result: tuple[Tensor, Any]) -> None:
    """A forward hook of an LSTM whose output no product with a weight follows."""
    hints.waive(result[0])


def _adopt_attention(attention: Any) -> bool:
    """Let the linear layers of an attention skip whose input is an LSTM's output, or the decoder's, as it is.

    Args:
        attention: ``onmt.modules.GlobalAttention``, or None.

    Returns:
        Whether it multiplies its query by a weight (general and mlp attention do, dot does not).
    """
    linears = {name: getattr(attention, name, None) for name in ("linear_in", "linear_query", "linear_context")}
    for linear in linears.values():
        if linear is not None:
            StructuredLinear.adopt(linear)
    return linears["linear_in"] is not None or linears["linear_query"] is not None


def _has_hooks(module: torch.nn.Module) -> bool:
    """Somebody wants to see, or change, what goes through this module."""
    return "forward" in module.__dict__ or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_plain(attention: Any) -> bool:
    """An attention of the host as it is: nobody replaced it or its linear layers, or hooked them."""
    if type(attention) is not GlobalAttention:
        return False
    linears = [layer for name, layer in attention.named_children() if name.startswith("linear_")]
    plain = all(type(linear) in (torch.nn.Linear, StructuredLinear) for linear in linears)
    # Of mlp attention two have a bias.
    biased = attention.attn_type != "mlp" and any(linear.bias is not None for linear in linears)
    return plain and not biased and not any(_has_hooks(module) for module in (attention, *linears))


def _check_layers(decoder: Any, exact: bool) -> None:
    """The encoder has handed on the states that the decoder's layers start from: of as many layers, or of more.

    Raises:
        UsageError: it has not; with ``exact``, also where there are more.
    """
    found, own = len(decoder.state["hidden"][0]), decoder.num_layers
    if found < own or (exact and found != own):
        rule = "with input_feed 0 as many are needed" if exact else "at least as many are needed"
        raise UsageError(f"dec_layers is {own}, and the encoder has {found} of them: {rule}")


def _follow(decoder: Any, dropout: float) -> None:
    """Set the dropout of the sites that both decoders have; each sets the one between its layers itself."""
    decoder.dropout.p = dropout
    decoder.rnn.recurrent_dropout = decoder.settings.recurrent_dropout(dropout)
    # Without attention the LSTM's output is the decoder's, which has a dropout already.
    decoder.rnn.output_dropout = decoder.settings.output_dropout(dropout) if decoder.attentional else 0.0
    update_embeddings(decoder.embeddings, dropout)


class StructuredRNNDecoder(DecoderBase):
    """Chooses the decoder that the options ask for, as OpenNMT-py does for its own name ``rnn`` alone."""

    @classmethod
    def from_opt(cls, opt: Namespace, embeddings: Any) -> RNNDecoderBase:
        """With ``input_feed`` the input-feeding decoder, else the standard one; stock where nothing is structured.

        Raises:
            UsageError: the ``sd_*`` options are not valid, or ``sd_rnn`` was asked of another RNN than the LSTM.
        """
        feeds = opt.decoder_type == "ifrnn" or bool(opt.input_feed)
        stock = InputFeedRNNDecoder if feeds else StdRNNDecoder
        if not is_ours(opt.decoder_type, opt.rnn_type):
            return stock.from_opt(opt, embeddings)
        settings = resolve(opt)
        if settings.mode == "random":
            return stock.from_opt(opt, embeddings)
        decoder = (StructuredInputFeedRNNDecoder if feeds else StructuredStdRNNDecoder).from_opt(opt, embeddings)
        decoder.restructure(settings)
        return decoder


class StructuredStdRNNDecoder(StdRNNDecoder):
    """``onmt.decoders.StdRNNDecoder`` whose embedding, LSTM, attention and output products skip dropped units."""

    rnn: Any
    dropout: Any

    def restructure(self, settings: Settings) -> None:
        """Replace the stock recurrent part and dropouts; parameters and their names stay."""
        dropout = self.dropout.p
        self.settings = settings
        StructuredDropoutLSTM.adopt(self.rnn, mode=settings.mode, sampling=settings.sampling, site="decoder.rnn")
        self.dropout = StructuredDropout(dropout, batch_first=True, sampling=settings.sampling, site="decoder.output")
        structure_embeddings(self.embeddings, settings.sampling, "decoder.embeddings")
        if not _adopt_attention(self.attn):
            # A dot attention joins it with the context vector, and no product sees it alone.
            self.rnn.register_forward_hook(_waive_output)
        self.update_dropout(dropout)

    @property
    def current_dropout(self) -> float:
        """The dropout that its sites follow now."""
        return float(self.dropout.p)

    def update_dropout(self, dropout: float, attention_dropout: float | None = None) -> None:
        """Set the dropout of every site that follows ``dropout``."""
        self.rnn.dropout = dropout
        _follow(self, dropout)

    def _to_stock(self) -> None:
        # For `sd_plugin.to_stock`, which changes the modules inside by themselves.
        for key in [key for key, hook in self.rnn._forward_hooks.items() if hook is _waive_output]:
            del self.rnn._forward_hooks[key]
        self.__class__ = StdRNNDecoder
        del self.settings

    def _run_forward_pass(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        state, dec_outs, attentions = super()._run_forward_pass(*args, **kwargs)
        # The host's loss slices it and views it for the generator.
        return state, hints.vouch(dec_outs), attentions

    def init_state(self, src: Tensor, enc_out: Tensor, enc_final_hs: Any) -> None:
        """See the stock method.

        Raises:
            UsageError: the encoder has more or fewer layers.
        """
        super().init_state(src, enc_out, enc_final_hs)
        if isinstance(enc_final_hs, tuple):
            _check_layers(self, exact=True)


class StructuredInputFeedRNNDecoder(InputFeedRNNDecoder):
    """``onmt.decoders.InputFeedRNNDecoder``: the kept units of ``[emb_t, feed]`` are the union of both."""

    rnn: Any
    dropout: Any

    def restructure(self, settings: Settings) -> None:
        """Replace the stock recurrent part and dropouts; parameters and their names stay."""
        dropout = self.dropout.p
        self.settings = settings
        stock = self.rnn
        self.rnn = StackedStructuredLSTM(
            stock.num_layers,
            self._input_size,
            self.hidden_size,
            mode=settings.mode,
            sampling=settings.sampling,
            site="decoder.rnn",
            layers=stock.layers,
        )
        self.query_is_multiplied = _adopt_attention(self.attn)
        _adopt_attention(self.copy_attn)
        structure_embeddings(self.embeddings, settings.sampling, "decoder.embeddings")
        self.update_dropout(dropout)

    @property
    def current_dropout(self) -> float:
        """The dropout that its sites follow now."""
        return float(self.dropout.p)

    def update_dropout(self, dropout: float, attention_dropout: float | None = None) -> None:
        """Set the dropout of every site that follows ``dropout``."""
        self.rnn.dropout.p = dropout
        _follow(self, dropout)

    def _to_stock(self) -> None:
        # For `sd_plugin.to_stock`, which changes the modules inside by themselves.
        self.__class__ = InputFeedRNNDecoder
        del self.settings, self.query_is_multiplied

    def init_state(self, src: Tensor, enc_out: Tensor, enc_final_hs: Any) -> None:
        """See the stock method; of an encoder with more layers, the first ones' states are used, as there.

        Raises:
            UsageError: the encoder has fewer layers.
        """
        super().init_state(src, enc_out, enc_final_hs)
        if isinstance(enc_final_hs, tuple):
            _check_layers(self, exact=False)

    def _run_forward_pass(
        self, tgt: Tensor, enc_out: Tensor, src_len: Tensor | None = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """See the stock method. In training the patterns of the whole target are drawn first."""
        # A single state is that of an encoder without a recurrent part, which is the host's to refuse.
        if not self.training or len(self.state["hidden"]) != 2:
            return super()._run_forward_pass(tgt, enc_out, src_len=src_len)  # type: ignore[no-any-return]
        emb = self.embeddings(tgt)
        batch, count, _ = emb.shape
        run = self.rnn.start(count, batch, emb)
        drop = self._output_dropout(count, batch, emb, run.skips)
        state, feed = self.rnn.own_states(self.state["hidden"]), self.state["input_feed"].squeeze(0)
        if self._is_one_operation(emb):
            lengths = emb.new_full((batch,), enc_out.shape[1], dtype=torch.int32) if src_len is None else src_len
            query = self.attn.linear_in.weight if self.attn.attn_type == "general" else None
            y, state, align = attentional_decoder(
                run, emb, enc_out, lengths, state, feed, drop, query, self.attn.linear_out.weight
            )
            return state, hints.vouch(y), self._attentions(y, align, enc_out)
        record = _AttentionRecord(self)
        outputs = []
        emb_steps = hints.unbind(emb, _BATCH_FIRST) if run.skips else hints.waive(emb).unbind(1)
        for t, emb_t in enumerate(emb_steps):
            dec_in = hints.cat([emb_t, feed])
            rnn_out, state = run.step(t, dec_in, state)
            hints.vouch(rnn_out)
            if not self.query_is_multiplied:
                # A dot attention joins it with the context vector, and no product sees it alone.
                hints.waive(rnn_out)
            feed = drop(t, self._attend(rnn_out, dec_in, enc_out, src_len, record))
            record.copy(feed, enc_out)
            outputs.append(feed)
        return state, hints.vouch(drop.stack(outputs, _BATCH_FIRST)), record.stacked()

    def _is_one_operation(self, emb: Tensor) -> bool:
        """Nothing about this decoder needs its steps one by one, and the backend is faster without.

        What may stand between two steps: another attention than Luong's, a gate, and an attention that somebody has
        replaced or hooked. Coverage and copy attention do not: nothing of them is fed back. (Hooks of the cells are
        called in neither case: in training their products are not theirs.)
        """
        attention = self.attn
        if not self.attentional or self.context_gate is not None or attention.attn_type == "mlp":
            return False
        if not _is_plain(attention) or attention.attn_func != "softmax":
            return False
        return (self.copy_attn is None or _is_plain(self.copy_attn)) and is_available(emb)

    def _attentions(self, dec_out: Tensor, align: Tensor, enc_out: Tensor) -> dict[str, Tensor]:
        """Every kind of attention, ``[T, B, S]``, after the decoder as one operation.

        Args:
            dec_out: ``[B, T, H]``, with its hint; align: ``[T, B, S]``.
        """
        attentions = {"std": align}
        if self._coverage:
            before = self.state["coverage"]
            attentions["coverage"] = align.cumsum(0) if before is None else align.cumsum(0) + before
        if self._reuse_copy_attn:
            attentions["copy"] = align
        elif self.copy_attn is not None and self.copy_attn.attn_type == "mlp":
            # Step by step: at once it would hold ``[B, T, S, H]`` twice, of which it keeps one.
            steps = _copies_of_steps(dec_out)
            attentions["copy"] = torch.stack([self.copy_attn(step, enc_out)[1] for step in steps])
        elif self.copy_attn is not None:
            attentions["copy"] = self.copy_attn(dec_out, enc_out)[1].transpose(0, 1).contiguous()
        return attentions

    def _output_dropout(self, count: int, batch: int, like: Tensor, hinted: bool) -> SteppedDropout:
        pattern = draw(
            Case.III,
            count,
            batch,
            self.hidden_size,
            self.dropout.p,
            sampling=self.settings.sampling,
            device=like.device,
            dtype=like.dtype,
        )
        return SteppedDropout(pattern, "decoder.output", hinted)

    def _attend(
        self, rnn_out: Tensor, dec_in: Tensor, enc_out: Tensor, src_len: Tensor | None, record: _AttentionRecord
    ) -> Tensor:
        """The decoder's output at one step, before its dropout."""
        dec_out = rnn_out
        if self.attentional:
            dec_out, p_attn = self.attn(rnn_out, enc_out, src_len=src_len)
            record.attended(p_attn)
        if self.context_gate is not None:
            dec_out = self.context_gate(dec_in, rnn_out, dec_out)
        return dec_out


def _copies_of_steps(dec_out: Tensor) -> list[Tensor]:
    """The time steps of ``[B, T, H]``, each ``[B, H]`` in its own memory: a view of it then finds its hint."""
    steps = Steps.packed(dec_out.shape[:1])
    return [hints.carry(row, steps, row.clone(), steps) for row in hints.unbind(dec_out, _BATCH_FIRST)]


class _AttentionRecord:
    """The attentions of an input-feeding decoder over its steps, as the stock decoder returns them."""

    def __init__(self, decoder: StructuredInputFeedRNNDecoder) -> None:
        self._decoder = decoder
        coverage = decoder.state["coverage"]
        self._coverage = None if coverage is None else coverage.squeeze(0)
        self._kinds: dict[str, list[Tensor]] = {}

    def attended(self, p_attn: Tensor) -> None:
        """The standard attention of one step; coverage is its running sum (See et al. 2017)."""
        self._kinds.setdefault("std", []).append(p_attn)
        if self._decoder._coverage:
            self._coverage = p_attn if self._coverage is None else p_attn + self._coverage
            self._kinds.setdefault("coverage", []).append(self._coverage)

    def copy(self, dec_out: Tensor, enc_out: Tensor) -> None:
        """The copy attention of one step, from the dropped output."""
        if self._decoder.copy_attn is not None:
            self._kinds.setdefault("copy", []).append(self._decoder.copy_attn(dec_out, enc_out)[1])
        elif self._decoder._reuse_copy_attn:
            self._kinds["copy"] = self._kinds["std"]

    def stacked(self) -> dict[str, Tensor]:
        """Every kind of attention, ``[T, B, S]``."""
        return {kind: torch.stack(steps) for kind, steps in self._kinds.items()}
