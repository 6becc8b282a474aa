"""Stand-in: the decoder, and language models."""

from torch import nn

from .awdlstm import AWD_LSTM, RNNDropout

__all__ = ["LinearDecoder", "SequentialRNN", "get_language_model"]


class LinearDecoder(nn.Module):
    """Returns logits, and its input as it came and as it dropped it."""

    def __init__(self, n_out, n_hid, output_p=0.1, tie_encoder=None, bias=True):
        super().__init__()
        self.decoder = nn.Linear(n_hid, n_out, bias=bias)
        self.output_dp = RNNDropout(output_p)
        if tie_encoder is not None:
            self.decoder.weight = tie_encoder.weight

    def forward(self, input):
        dropped = self.output_dp(input)
        return self.decoder(dropped), input, dropped


class SequentialRNN(nn.Sequential):
    def reset(self):
        for child in self.children():
            getattr(child, "reset", lambda: None)()


def get_language_model(vocab_sz, emb_sz, n_hid, n_layers, output_p=0.1, **config):
    encoder = AWD_LSTM(vocab_sz, emb_sz, n_hid, n_layers, **config)
    return SequentialRNN(encoder, LinearDecoder(vocab_sz, emb_sz, output_p, tie_encoder=encoder.encoder))
