from src.models.tagger_base import TaggerBase


class TaggerBiRNNCRF(TaggerBase):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, characters=False, **kwargs)

    def _forward_birnn(self, word_sequences):
        mask = self.get_mask_from_word_sequences(word_sequences)
        z = self.dropout(self.word_embeddings_layer(word_sequences))
        y = self.dropout(self.birnn_layer(z, mask))
        return self.apply_mask(self.lin_layer(y), mask)

    def scores(self, sentences):
        return self._forward_birnn(sentences)
