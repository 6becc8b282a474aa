"""Stand-in: locked dropout, weight dropout, embedding dropout, and the batch-first stack of LSTMs between them."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["AWD_LSTM", "EmbeddingDropout", "RNNDropout", "WeightDropout", "dropout_mask"]


def dropout_mask(x, sz, p):
    keep = 1 - p
    return x.new_empty(*sz).bernoulli_(keep) / keep


class RNNDropout(nn.Module):
    """The same units of a sequence at all of its time steps."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.training and self.p != 0:
            shape = (x.size(0), 1, *x.shape[2:])
            return x * dropout_mask(x.data, shape, self.p)
        return x


class WeightDropout(nn.Module):
    """Keeps the raw parameters itself, and sets plain tensors in the module it wraps."""

    def __init__(self, module, weight_p, layer_names="weight_hh_l0"):
        super().__init__()
        self.module, self.weight_p = module, weight_p
        self.layer_names = [layer_names] if isinstance(layer_names, str) else list(layer_names)
        for name in self.layer_names:
            weight = module._parameters.pop(name)
            self.register_parameter(f"{name}_raw", nn.Parameter(weight.data))
            setattr(module, name, weight.clone())
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters = self._do_nothing

    def _do_nothing(self):
        pass

    def _setweights(self):
        for name in self.layer_names:
            raw = getattr(self, f"{name}_raw")
            setattr(self.module, name, F.dropout(raw, p=self.weight_p) if self.training else raw.clone())

    def forward(self, *args):
        self._setweights()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            return self.module(*args)

    def reset(self):
        for name in self.layer_names:
            setattr(self.module, name, getattr(self, f"{name}_raw").clone())


class EmbeddingDropout(nn.Module):
    """Whole words of the vocabulary."""

    def __init__(self, emb, embed_p):
        super().__init__()
        self.emb, self.embed_p = emb, embed_p

    def forward(self, words, scale=None):
        emb, table = self.emb, self.emb.weight
        if self.training and self.embed_p != 0:
            table = table * dropout_mask(table.data, (table.size(0), 1), self.embed_p)
        if scale:
            table.mul_(scale)
        padding = -1 if emb.padding_idx is None else emb.padding_idx
        return F.embedding(words, table, padding, emb.max_norm, emb.norm_type, emb.scale_grad_by_freq, emb.sparse)


class AWD_LSTM(nn.Module):
    """Carries its own state from batch to batch, and returns the last layer's output, ``[B, T, emb_sz]``."""

    def __init__(
        self,
        vocab_sz,
        emb_sz,
        n_hid,
        n_layers,
        pad_token=1,
        hidden_p=0.2,
        input_p=0.6,
        embed_p=0.1,
        weight_p=0.5,
        bidir=False,
    ):
        super().__init__()
        self.emb_sz, self.n_hid, self.n_layers, self.bs, self.n_dir = emb_sz, n_hid, n_layers, 1, 1 + bidir
        self.encoder = nn.Embedding(vocab_sz, emb_sz, padding_idx=pad_token)
        self.encoder_dp = EmbeddingDropout(self.encoder, embed_p)
        widths = [emb_sz, *[n_hid] * (n_layers - 1), emb_sz]
        self.rnns = nn.ModuleList(
            self._one_rnn(widths[layer], widths[layer + 1] // self.n_dir, bidir, weight_p, layer)
            for layer in range(n_layers)
        )
        self.input_dp = RNNDropout(input_p)
        self.hidden_dps = nn.ModuleList(RNNDropout(hidden_p) for _ in range(n_layers))
        self.reset()

    def _one_rnn(self, n_in, n_out, bidir, weight_p, l):  # noqa: E741
        return WeightDropout(nn.LSTM(n_in, n_out, batch_first=True, bidirectional=bidir), weight_p)

    def forward(self, inp, from_embeds=False):
        if len(inp) != self.bs:
            self.bs = len(inp)
            self.reset()
        output = self.input_dp(inp if from_embeds else self.encoder_dp(inp))
        states = []
        for layer, (rnn, dropout) in enumerate(zip(self.rnns, self.hidden_dps, strict=True)):
            output, state = rnn(output, self.hidden[layer])
            states.append(tuple(part.detach() for part in state))
            if layer != self.n_layers - 1:
                output = dropout(output)
        self.hidden = states
        return output

    def reset(self):
        for rnn in self.rnns:
            rnn.reset()
        sizes = [rnn.module.hidden_size for rnn in self.rnns]
        zeros = [torch.zeros(self.n_dir, self.bs, size, dtype=self.encoder.weight.dtype) for size in sizes]
        self.hidden = [(zero, zero) for zero in zeros]
