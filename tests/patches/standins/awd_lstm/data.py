"""Stand-in: the words of a corpus as numbers."""

from pathlib import Path

import torch


class Dictionary:
    def __init__(self):
        self.word2idx, self.idx2word = {}, []

    def add_word(self, word):
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self):
        return len(self.idx2word)


class Corpus:
    def __init__(self, path):
        self.dictionary = Dictionary()
        self.train, self.valid, self.test = (
            self.tokenize(Path(path, f"{part}.txt")) for part in ("train", "valid", "test")
        )

    def tokenize(self, path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return torch.tensor([self.dictionary.add_word(word) for line in lines for word in [*line.split(), "<eos>"]])
