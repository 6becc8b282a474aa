import torch


class Indexer:
    """Index 0 is padding, and what is not known."""

    def __init__(self, items):
        self.items = ["<pad>", *dict.fromkeys(items)]
        self.index = {item: i for i, item in enumerate(self.items)}

    def items2tensor(self, sequences):
        tensor = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
        for i, sequence in enumerate(sequences):
            tensor[i, : len(sequence)] = torch.tensor([self.index.get(item, 0) for item in sequence])
        return tensor
