"""Stand-in: trains the model, with SGD and then its average."""

import hashlib
import math
import os

import data
import model
import numpy as np
import torch
from splitcross import SplitCrossEntropyLoss
from utils import batchify, get_batch, options, repackage_hidden

parser = options(save="unnamed.pt")
parser.add_argument("--resume", default="")
parser.add_argument("--optimizer", default="sgd")
parser.add_argument("--when", nargs="+", type=int, default=[-1])
args = parser.parse_args()
np.random.seed(args.seed)  # noqa: NPY002
torch.manual_seed(args.seed)


def model_save(path):
    with open(path, "wb") as file:
        torch.save([model, criterion, optimizer], file)


def model_load(path):
    global model, criterion, optimizer
    with open(path, "rb") as file:
        model, criterion, optimizer = torch.load(file)


cached = f"corpus.{hashlib.md5(args.data.encode()).hexdigest()}.data"
if os.path.exists(cached):
    print("Loading cached dataset...")
    corpus = torch.load(cached)
else:
    print("Producing dataset...")
    corpus = data.Corpus(args.data)
    torch.save(corpus, cached)
train_data = batchify(corpus.train, args.batch_size, args)
val_data, test_data = batchify(corpus.valid, 4, args), batchify(corpus.test, 1, args)
model = model.RNNModel(
    args.model, len(corpus.dictionary), args.emsize, args.nhid, args.nlayers, args.dropout, args.dropouth,
    args.dropouti, args.dropoute, args.wdrop, True,
)  # fmt: skip
criterion = SplitCrossEntropyLoss(args.emsize, splits=[])
if args.resume:
    print("Resuming model ...")
    model_load(args.resume)
if args.cuda:
    model, criterion = model.cuda(), criterion.cuda()
print("Args:", args)


def evaluate(source, batch_size):
    model.eval()
    total, hidden = 0, model.init_hidden(batch_size)
    for i in range(0, len(source) - 1, args.bptt):
        words, targets = get_batch(source, i, args, evaluation=True)
        output, hidden = model(words, hidden)
        total += len(words) * criterion(model.decoder.weight, model.decoder.bias, output, targets).data
        hidden = repackage_hidden(hidden)
    return total.item() / len(source)


def train():
    i, hidden = 0, model.init_hidden(args.batch_size)
    while i < len(train_data) - 2:
        model.train()
        length = max(3, int(np.random.normal(args.bptt, 1)))  # noqa: NPY002
        words, targets = get_batch(train_data, i, args, seq_len=length)
        hidden = repackage_hidden(hidden)
        optimizer.zero_grad()
        output, hidden, raw_outputs, outputs = model(words, hidden, return_h=True)
        loss = criterion(model.decoder.weight, model.decoder.bias, output, targets)
        loss = loss + 2 * outputs[-1].pow(2).mean() + (raw_outputs[-1][1:] - raw_outputs[-1][:-1]).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        i += length


kind = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
optimizer = kind(model.parameters(), lr=args.lr)
losses, stored = [], math.inf
for epoch in range(1, args.epochs + 1):
    train()
    averaged = "t0" in optimizer.param_groups[0]
    if averaged:
        kept = {parameter: parameter.data.clone() for parameter in model.parameters()}
        for parameter in kept:
            parameter.data = optimizer.state[parameter]["ax"].clone()
    losses.append(evaluate(val_data, 4))
    print(f"| end of epoch {epoch} | valid loss {losses[-1]:.7f}")
    if losses[-1] < stored:
        model_save(args.save)
        print("Saving Averaged!" if averaged else "Saving model (new best validation)")
        stored = losses[-1]
    if averaged:
        for parameter in kept:
            parameter.data = kept[parameter]
    elif args.optimizer == "sgd" and epoch > args.nonmono + 1 and losses[-1] > min(losses[: -args.nonmono - 1]):
        print("Switching to ASGD")
        optimizer = torch.optim.ASGD(model.parameters(), lr=args.lr, t0=0, lambd=0.0)
    if epoch in args.when:
        model_save(f"{args.save}.e{epoch}")
model_load(args.save)
print(f"| End of training | test loss {evaluate(test_data, 1):.7f}")
