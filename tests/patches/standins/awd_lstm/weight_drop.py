"""Stand-in: a layer some of whose weights are dropped anew at every call."""

from torch import nn


class WeightDrop(nn.Module):
    def __init__(self, module, weights, dropout=0, variational=False):
        super().__init__()
        self.module, self.weights, self.dropout, self.variational = module, weights, dropout, variational
        self._setup()

    def widget_demagnetizer_y2k_edition(*args, **kwargs):
        """In the place of ``flatten_parameters``; a lambda could not be pickled."""

    def _setup(self):
        if isinstance(self.module, nn.RNNBase):
            self.module.flatten_parameters = self.widget_demagnetizer_y2k_edition
        for name in self.weights:
            self.module.register_parameter(name + "_raw", nn.Parameter(self.module._parameters.pop(name).data))

    def _setweights(self):
        for name in self.weights:
            raw = getattr(self.module, name + "_raw")
            if self.variational:
                weight = nn.functional.dropout(raw.new_ones(len(raw), 1), self.dropout, True).expand_as(raw) * raw
            else:
                # In evaluation this is the parameter itself, which modern torch then registers under this name.
                weight = nn.functional.dropout(raw, self.dropout, self.training)
            setattr(self.module, name, weight)

    def forward(self, *args):
        self._setweights()
        return self.module.forward(*args)
