import torch


class DatasetsBank:
    def __init__(self, parts):
        self.parts = parts

    def get_train_batches(self, batch_size):
        words, tags = self.parts[0]
        order = torch.randperm(len(words)).tolist()
        for k in range(0, len(words) - batch_size + 1, batch_size):
            chosen = order[k : k + batch_size]
            yield [words[i] for i in chosen], [tags[i] for i in chosen]


class DatasetsBankSorted(DatasetsBank):
    def get_train_batches(self, batch_size):
        yield from super().get_train_batches(batch_size)
