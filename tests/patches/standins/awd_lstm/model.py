"""Stand-in: the language model."""

from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout
from torch import nn
from weight_drop import WeightDrop


class RNNModel(nn.Module):
    def __init__(
        self, rnn_type, ntoken, ninp, nhid, nlayers, dropout=0.5, dropouth=0.5, dropouti=0.5, dropoute=0.1, wdrop=0,
        tie_weights=False,
    ):  # fmt: skip
        super().__init__()
        self.rnn_type, self.nlayers = rnn_type, nlayers
        self.dropout, self.dropouth, self.dropouti, self.dropoute = dropout, dropouth, dropouti, dropoute
        self.sizes = [nhid] * (nlayers - 1) + [ninp if tie_weights else nhid]
        self.lockdrop = LockedDropout()
        self.encoder = nn.Embedding(ntoken, ninp)
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}[rnn_type]
        rnns = [kind(size_in, size, 1) for size_in, size in zip([ninp, *self.sizes], self.sizes, strict=False)]
        self.rnns = nn.ModuleList([WeightDrop(rnn, ["weight_hh_l0"], wdrop) for rnn in rnns] if wdrop else rnns)
        self.decoder = nn.Linear(self.sizes[-1], ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, input, hidden, return_h=False):
        """Hidden states of the last layer, ``[T * B, H]``: the decoder is left to the criterion."""
        raw = self.lockdrop(
            embedded_dropout(self.encoder, input, dropout=self.dropoute if self.training else 0), self.dropouti
        )
        raw_outputs, outputs, states = [], [], []
        for layer, rnn in enumerate(self.rnns):
            raw, state = rnn(raw, hidden[layer])
            raw_outputs.append(raw)
            states.append(state)
            raw = self.lockdrop(raw, self.dropouth if layer < self.nlayers - 1 else self.dropout)
            outputs.append(raw)
        result = raw.view(-1, raw.size(2))
        return (result, states, raw_outputs, outputs) if return_h else (result, states)

    def init_hidden(self, bsz):
        zeros = [self.decoder.bias.data.new_zeros(1, bsz, size) for size in self.sizes]
        return [(zero, zero.clone()) for zero in zeros] if self.rnn_type == "LSTM" else zeros
