"""Stand-in: one dropout mask per sequence, the same at all time steps."""

from torch import nn


class LockedDropout(nn.Module):
    def forward(self, x, dropout=0.5):
        if not dropout or not self.training:
            return x
        keep = x.data.new_empty(1, *x.shape[1:]).bernoulli_(1 - dropout)
        return (keep / (1 - dropout)).expand_as(x) * x
