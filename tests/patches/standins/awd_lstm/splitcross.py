"""Stand-in: a softmax in splits; the words of every split but the first are reached through a word of the first."""

from collections import defaultdict

import torch
from torch import nn
from torch.nn.functional import linear, log_softmax


class SplitCrossEntropyLoss(nn.Module):
    def __init__(self, hidden_size, splits, verbose=False):
        super().__init__()
        self.splits = [0, *splits, 10**8]
        self.nsplits = len(self.splits) - 1
        self.stats = defaultdict(list)
        self.verbose = verbose
        if self.nsplits > 1:
            self.tail_vectors = nn.Parameter(torch.zeros(self.nsplits - 1, hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(self.nsplits - 1))

    def split_on_targets(self, hiddens, targets):
        splits = list(zip(self.splits, self.splits[1:], strict=False))
        chosen = [(targets >= start) & (targets < end) for start, end in splits]
        return [targets[rows] for rows in chosen], [hiddens[rows] for rows in chosen]

    def forward(self, weight, bias, hiddens, targets, verbose=False):
        split_targets, split_hiddens = self.split_on_targets(hiddens.view(-1, hiddens.size(-1)), targets)
        head_weight, head_bias = weight[: self.splits[1]], bias[: self.splits[1]]
        if self.nsplits > 1:
            head_weight = torch.cat([head_weight, self.tail_vectors])
            head_bias = torch.cat([head_bias, self.tail_bias])
        total = 0.0
        for n, (own, rows) in enumerate(zip(split_targets, split_hiddens, strict=True)):
            start, end = self.splits[n : n + 2]
            if verbose or self.verbose:
                self.stats[n].append(len(rows) * len(weight[start:end]))
                print(f"split {n}: {self.stats[n][-1]}")
            log_p = log_softmax(linear(rows, head_weight, head_bias), -1)
            if n:
                tail = log_softmax(linear(rows, weight[start:end], bias[start:end]), -1)
                entropy = -(log_p[:, -n] + tail.gather(1, (own - start).view(-1, 1)).squeeze(1))
            else:
                entropy = -log_p.gather(1, own.view(-1, 1))
            total = total + entropy.float().sum()
        return (total / len(targets)).type_as(weight)
