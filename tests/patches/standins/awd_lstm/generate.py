"""Stand-in: writes text by the model, which it takes to return logits."""

import argparse

import data
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="./data/penn")
parser.add_argument("--checkpoint", default="./model.pt")
parser.add_argument("--outf", default="generated.txt")
parser.add_argument("--words", type=int, default=1000)
parser.add_argument("--cuda", action="store_true")
args = parser.parse_args()
torch.manual_seed(1111)
with open(args.checkpoint, "rb") as file:
    model = torch.load(file)
model.eval()
model = model.cuda() if args.cuda else model.cpu()
dictionary = data.Corpus(args.data).dictionary
word, hidden = torch.zeros(1, 1, dtype=torch.long), model.init_hidden(1)
with open(args.outf, "w") as file:
    for _ in range(args.words):
        output, hidden = model(word, hidden)
        assert output.numel() == len(dictionary), "logits"
        word.fill_(torch.multinomial(output.squeeze().data.exp(), 1)[0])
        file.write(dictionary.idx2word[word] + "\n")
print("| Generated")
