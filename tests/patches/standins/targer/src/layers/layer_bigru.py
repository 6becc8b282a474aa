from src.layers.layer_birnn_base import LayerBiRNNBase
from torch import nn


class LayerBiGRU(LayerBiRNNBase):
    def __init__(self, input_dim, hidden_dim, gpu):
        super().__init__(input_dim, hidden_dim, gpu)
        self.rnn = nn.GRU(input_dim, hidden_dim, batch_first=True, bidirectional=True)

    def forward(self, input_tensor, mask_tensor):
        packed, back = self.pack(input_tensor, mask_tensor)
        result, _ = self.rnn(packed)
        return self.unpack(result, input_tensor.shape[1], back)
