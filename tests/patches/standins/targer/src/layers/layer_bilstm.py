"""Stand-in: a bidirectional LSTM over sequences of different lengths."""

import torch
from src.layers.layer_birnn_base import LayerBiRNNBase
from torch import nn


class LayerBiLSTM(LayerBiRNNBase):
    def __init__(self, input_dim, hidden_dim, gpu):
        super().__init__(input_dim, hidden_dim, gpu)
        self.rnn = nn.LSTM(input_dim, hidden_dim, batch_first=True, bidirectional=True)

    def forward(self, input_tensor, mask_tensor):
        packed, back = self.pack(input_tensor, mask_tensor)
        zeros = torch.zeros(2, len(input_tensor), self.hidden_dim)
        result, _ = self.rnn(packed, (zeros, zeros))
        return self.unpack(result, input_tensor.shape[1], back)
