import torch
from src.models.tagger_birnn import TaggerBiRNN
from src.models.tagger_birnn_cnn import TaggerBiRNNCNN
from src.models.tagger_birnn_cnn_crf import TaggerBiRNNCNNCRF
from src.models.tagger_birnn_crf import TaggerBiRNNCRF

TAGGERS = (TaggerBiRNN, TaggerBiRNNCNN, TaggerBiRNNCRF, TaggerBiRNNCNNCRF)


class TaggerFactory:
    @staticmethod
    def load(checkpoint_fn, gpu=-1):
        return torch.load(checkpoint_fn)
