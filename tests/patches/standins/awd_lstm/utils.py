"""Stand-in: batches; and the options that the programs have in common, which the host repeats in each of them."""

import argparse

import torch


def repackage_hidden(h):
    return h.detach() if isinstance(h, torch.Tensor) else tuple(repackage_hidden(part) for part in h)


def batchify(data, bsz, args):
    columns = data[: len(data) // bsz * bsz].view(bsz, -1).t().contiguous()
    return columns.cuda() if args.cuda else columns


def get_batch(source, i, args, seq_len=None, evaluation=False):
    length = min(seq_len or args.bptt, len(source) - 1 - i)
    return source[i : i + length], source[i + 1 : i + 1 + length].view(-1)


def options(save):
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data/penn/")
    parser.add_argument("--model", default="LSTM")
    sizes = {"emsize": 6, "nhid": 8, "nlayers": 2, "epochs": 2, "batch_size": 4, "bptt": 6, "seed": 1111, "nonmono": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    numbers = {"lr": 5.0, "dropout": 0.4, "dropouth": 0.3, "dropouti": 0.65, "dropoute": 0.1, "wdrop": 0.5}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    # As in the host: given, it switches CUDA off.
    parser.add_argument("--cuda", action="store_false")
    parser.add_argument("--save", default=save)
    return parser
