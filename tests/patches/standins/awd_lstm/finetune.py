"""Stand-in: goes on with the averaged model. As old as the host's: of a torch whose losses had one dimension."""

import sys

import data
import model
import torch
from torch import nn
from utils import batchify, get_batch, options, repackage_hidden

args = options(save="unnamed.pt").parse_args()
torch.manual_seed(args.seed)
corpus = data.Corpus(args.data)
ntokens = len(corpus.dictionary)
train_data, val_data = batchify(corpus.train, args.batch_size, args), batchify(corpus.valid, 4, args)
model = model.RNNModel("LSTM", ntokens, args.emsize, args.nhid, args.nlayers)
criterion = nn.CrossEntropyLoss()


def evaluate(source):
    model.eval()
    total, hidden = 0, model.init_hidden(4)
    for i in range(0, len(source) - 1, args.bptt):
        words, targets = get_batch(source, i, args, evaluation=True)
        output, hidden = model(words, hidden)
        total += len(words) * criterion(output.view(-1, ntokens), targets).data
        hidden = repackage_hidden(hidden)
    return total[0] / len(source)


def train():
    model.train()
    hidden = model.init_hidden(args.batch_size)
    for i in range(0, len(train_data) - 2, args.bptt):
        words, targets = get_batch(train_data, i, args)
        hidden = repackage_hidden(hidden)
        optimizer.zero_grad()
        output, hidden, _, _ = model(words, hidden, return_h=True)
        criterion(output.view(-1, ntokens), targets).backward()
        optimizer.step()


def load():
    with open(args.save, "rb") as file:
        return torch.load(file)


model = load()
losses = [evaluate(val_data)]
optimizer = torch.optim.ASGD(model.parameters(), lr=args.lr, t0=0, lambd=0.0)
for epoch in range(1, args.epochs + 1):
    train()
    losses.append(evaluate(val_data))
    print(f"| end of epoch {epoch} | valid loss {losses[-1]:.7f}")
    if losses[-1] < min(losses[:-1]):
        with open(args.save, "wb") as file:
            torch.save(model, file)
        print("Saving Averaged!")
    if epoch > args.nonmono + 1 and losses[-1] > min(losses[: -args.nonmono - 1]):
        print("Done!")
        sys.exit(1)
model = load()
print(f"| End of training | valid loss {evaluate(val_data):.7f}")
