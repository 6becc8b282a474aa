import torch
from src.models.tagger_base import TaggerBase


class TaggerBiRNNCNN(TaggerBase):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, characters=True, **kwargs)

    def forward(self, word_sequences):
        mask = self.get_mask_from_word_sequences(word_sequences)
        characters = self.dropout(self.char_embeddings_layer(word_sequences))
        words = self.word_embeddings_layer(word_sequences)
        z = torch.cat((words, self.dropout(self.char_cnn_layer(characters))), 2)
        y = self.dropout(self.birnn_layer(z, mask))
        return self.apply_mask(self.lin_layer(y), mask)

    def scores(self, sentences):
        return self.forward(sentences)
