"""Stand-in for fastai: its AWD-LSTM's module and class interface, written anew for tests without fastai."""

__version__ = "2.8.12"
