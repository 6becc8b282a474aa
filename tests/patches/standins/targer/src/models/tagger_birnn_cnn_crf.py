import torch
from src.models.tagger_base import TaggerBase


class TaggerBiRNNCNNCRF(TaggerBase):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, characters=True, **kwargs)

    def _forward_birnn(self, word_sequences):
        mask = self.get_mask_from_word_sequences(word_sequences)
        characters = self.dropout(self.char_embeddings_layer(word_sequences))
        words = self.dropout(self.word_embeddings_layer(word_sequences))
        z = torch.cat((words, self.char_cnn_layer(characters)), 2)
        y = self.apply_mask(self.birnn_layer(z, mask), mask)
        return self.apply_mask(self.lin_layer(y), mask)

    def scores(self, sentences):
        return self._forward_birnn(sentences)
