"""Stand-in: the model with a pointer into the words before. Of a torch whose numbers were tensors of one dimension."""

import argparse

import data
import torch
from utils import batchify, get_batch, repackage_hidden

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="data/penn")
parser.add_argument("--save", default="best.pt")
parser.add_argument("--cuda", action="store_false")
parser.add_argument("--bptt", type=int, default=5000)
parser.add_argument("--window", type=int, default=4)
args = parser.parse_args()
corpus = data.Corpus(args.data)
ntokens = len(corpus.dictionary)


def one_hot(word):
    return torch.eye(ntokens)[word].view(1, -1).cuda()


def evaluate(source):
    model.eval()
    total, hidden = 0.0, model.init_hidden(1)
    for i in range(0, len(source) - 1, args.bptt):
        words, targets = get_batch(source, i, evaluation=True, args=args)
        output, hidden, raw_outputs, _ = model(words, hidden, return_h=True)
        history, states = torch.cat([one_hot(target.data[0]) for target in targets]), raw_outputs[-1].squeeze(1).data
        for n, p in enumerate(output.view(-1, ntokens).softmax(-1)):
            if n > args.window:
                before = slice(n - args.window, n)
                attention = (states[before] @ states[n]).softmax(0)
                p = 0.1 * (attention.view(-1, 1) * history[before]).sum(0) + 0.9 * p
            total += (-p[targets[n].data].log()).data[0]
        hidden = repackage_hidden(hidden)
    return total / len(source)


with open(args.save, "rb") as file:
    model = torch.load(file) if args.cuda else torch.load(file, map_location=lambda storage, place: storage)
print(f"| End of pointer | val loss {evaluate(batchify(corpus.valid, 1, args)):.7f}")
