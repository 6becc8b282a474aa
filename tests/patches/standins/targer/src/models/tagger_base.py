"""Stand-in: embeddings, layers, loss (a softmax where the host has a CRF) and prediction."""

import torch
from src.layers.layer_bigru import LayerBiGRU
from src.layers.layer_bilstm import LayerBiLSTM
from torch import nn


class CharCNN(nn.Module):
    def __init__(self, size, filters):
        super().__init__()
        self.conv = nn.Conv1d(size, filters, 3, padding=1)

    def forward(self, characters):
        batch, steps, size, length = characters.shape
        return self.conv(characters.reshape(-1, size, length)).amax(2).view(batch, steps, -1)


class Words(nn.Module):
    def __init__(self, indexer, size):
        super().__init__()
        self.indexer = indexer
        self.embeddings = nn.Embedding(len(indexer.items), size)

    def forward(self, sentences):
        return self.embeddings(self.indexer.items2tensor(sentences))


class Characters(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.embeddings = nn.Embedding(128, size)

    def forward(self, sentences):
        steps = max(map(len, sentences))
        codes = torch.zeros(len(sentences), steps, 6, dtype=torch.long)
        for i, sentence in enumerate(sentences):
            for t, word in enumerate(sentence):
                codes[i, t, : len(word[:6])] = torch.tensor([ord(c) % 128 for c in word[:6]])
        return self.embeddings(codes).permute(0, 1, 3, 2)


class TaggerBase(nn.Module):
    def __init__(
        self,
        word_seq_indexer,
        tag_seq_indexer,
        dropout_ratio=0.5,
        rnn_type="LSTM",
        gpu=-1,
        embedding_dim=20,
        rnn_hidden_dim=10,
        characters=False,
    ):
        super().__init__()
        self.word_seq_indexer, self.tag_seq_indexer = word_seq_indexer, tag_seq_indexer
        self.rnn_type, self.gpu = rnn_type, gpu
        self.dropout = nn.Dropout(dropout_ratio)
        self.word_embeddings_layer = Words(word_seq_indexer, embedding_dim)
        if characters:
            self.char_embeddings_layer = Characters(4)
            self.char_cnn_layer = CharCNN(4, 12)
        layer = {"LSTM": LayerBiLSTM, "GRU": LayerBiGRU}[rnn_type]
        self.birnn_layer = layer(embedding_dim + 12 * characters, rnn_hidden_dim, gpu)
        self.lin_layer = nn.Linear(2 * rnn_hidden_dim, len(tag_seq_indexer.items))

    def get_mask_from_word_sequences(self, sentences):
        lengths = torch.tensor([len(sentence) for sentence in sentences])
        return (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).float()

    def apply_mask(self, tensor, mask):
        return tensor * mask.unsqueeze(-1)

    def get_loss(self, sentences, tags):
        targets = self.tag_seq_indexer.items2tensor(tags)
        scores = self.scores(sentences).flatten(0, 1)
        return nn.functional.cross_entropy(scores, targets.flatten(), ignore_index=0)

    def predict_tags_from_words(self, sentences, batch_size=-1):
        self.eval()
        with torch.no_grad():
            best = self.scores(sentences)[:, :, 1:].argmax(2) + 1
        names = self.tag_seq_indexer.items
        return [[names[k] for k in row[: len(s)].tolist()] for row, s in zip(best, sentences, strict=True)]

    def save_tagger(self, checkpoint_fn):
        torch.save(self, checkpoint_fn)
