"""Stand-in: sorts sequences by length and packs them."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class LayerBiRNNBase(nn.Module):
    def __init__(self, input_dim, hidden_dim, gpu):
        super().__init__()
        self.hidden_dim, self.output_dim, self.gpu = hidden_dim, 2 * hidden_dim, gpu

    def sort_by_seq_len_list(self, lengths):
        order = torch.tensor(lengths).argsort(descending=True, stable=True)
        return [lengths[i] for i in order], order, order.argsort()

    def pack(self, input_tensor, mask_tensor):
        lengths, order, back = self.sort_by_seq_len_list(mask_tensor.sum(1).int().tolist())
        rows = torch.index_select(input_tensor, 0, order)
        return pack_padded_sequence(rows, lengths, batch_first=True), back

    def unpack(self, packed, steps, back):
        rows, _ = pad_packed_sequence(packed, batch_first=True, total_length=steps)
        return torch.index_select(rows, 0, back)
