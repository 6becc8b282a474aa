"""fastai 2: structured dropout in its AWD-LSTM, for language models and text classifiers.

| host | in training, in a structured mode |
|---|---|
| ``RNNDropout`` | the kept units of each time step, as a hint for the product that follows |
| ``WeightDropout`` | ``nr_rh_st``: units of :math:`h_{t-1}` are dropped inside the product, not weights; see below |
| ``LinearDecoder`` | its product skips what its dropout dropped |
| ``EmbeddingDropout`` | the same words dropped, but only the rows that are looked up are touched |
| ``AWD_LSTM`` | says which of its modules these are, for the report |

In mode ``random`` nothing of that changes, and ``nr_st`` keeps fastai's weight dropout, with the kept units of its
input. Units are dropped with the probability ``weight_p``, in both directions of a bidirectional LSTM, of whose
backward one fastai drops no weights. Layers that are no `nn.LSTM`, activations of a subclass (a `Learner` casts them to
`torch.Tensor` first) and evaluation are fastai's own.

Emitted states stay undropped, so that what `RNNCallback` keeps and `RNNRegularizer` penalises is what it was. Nothing
is stored in the modules, which `Learner.export` pickles whole.

Source: Sarma et al. 2021 (arXiv 2106.12089), table 1; Merity et al. 2017 (arXiv 1708.02182).
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sd_plugin._environment import read_case, read_switch
from sd_plugin.errors import UsageError

from ._fingerprint import Fingerprint, Function, difference, source_of
from ._host import Finding, Host, find_distribution, refusal
from ._patcher import Patcher
from ._settings import Settings, checked

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSIONS = ("2.7", "2.8")
CORE, AWD_LSTM = "fastai.text.models.core", "fastai.text.models.awdlstm"

FINGERPRINTS: dict[str, Fingerprint] = {
    AWD_LSTM: {
        "dropout_mask": Function.of("x sz p", "bernoulli_", "new_empty"),
        "RNNDropout.forward": Function.of("self x", "dropout_mask", "training", "p", "size", "shape"),
        "WeightDropout.__init__": Function.of(
            "self module weight_p layer_names", "register_parameter", "module", "weight_p", "layer_names"
        ),
        "WeightDropout._setweights": Function.of("self", "layer_names", "training", "dropout", "weight_p", "setattr"),
        "WeightDropout.forward": Function.of("self *args", "_setweights", "module"),
        "EmbeddingDropout.forward": Function.of(
            "self words scale", "dropout_mask", "emb", "embed_p", "training", "padding_idx", "max_norm"
        ),
        "AWD_LSTM.forward": Function.of("self inp from_embeds", "input_dp", "rnns", "hidden_dps", "hidden"),
        "AWD_LSTM._one_rnn": Function.of("self n_in n_out bidir weight_p l", "LSTM", "WeightDropout"),
    },
    CORE: {
        "LinearDecoder.__init__": Function.of(
            "self n_out n_hid output_p tie_encoder bias", "decoder", "output_dp", "RNNDropout", "Linear"
        ),
        "LinearDecoder.forward": Function.of("self input", "output_dp", "decoder"),
    },
}

_patcher = Patcher()


def _unsupported(version: str) -> str | None:
    if ".".join(version.split(".")[:2]) in VERSIONS:
        return None
    return f"fastai {version} is not supported; supported: {HOST.supported}"


def _find(environ: Mapping[str, str]) -> list[Finding]:
    return find_distribution("fastai", _unsupported)


HOST = Host(
    name="fastai",
    title="fastai",
    modules=(CORE,),
    supported=f"{' and '.join(VERSIONS)}, where the AWD-LSTM is that of 2.8.12",
    located="installed beside sd-plugin",
    find=_find,
    enabled=lambda: bool(_patcher),
    refuses=lambda mode, case, recurrent_dropout: (
        "mode random leaves fastai as it is" if mode == "random" else refusal(checked, mode, case, "exact", "II")
    ),
)


#: Names for the report, of modules that have been called.
_places: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def on_import(module: ModuleType) -> None:
    """Patch fastai when its text models are imported; ``core`` imports the others."""
    switch = read_switch(os.environ)
    if switch.replaces("fastai"):
        enable(mode=switch.mode or "nr_rh_st", case=read_case(os.environ))


def enable(mode: str = "nr_rh_st", case: str | None = None, sampling: str = "exact") -> None:
    """Give fastai's AWD-LSTM structured dropout, models that exist included.

    Args:
        mode: ``nr_rh_st``, ``nr_st`` (weights of the recurrent product are dropped, as by fastai), or ``random``:
            fastai as it is, nothing patched.
        case: of the paper's Fig. 1, how ``nr_rh_st`` and ``nr_st`` drop units; None for III. Mode ``random`` is II.
        sampling: ``exact`` or ``bernoulli``; see :func:`sd_plugin.patterns.draw_kept`.

    Raises:
        UsageError: an argument is not valid, or this fastai is not one that can be patched. Nothing is patched then.
        ImportError: fastai is not installed.
    """
    settings = checked(mode, case, sampling, own_case="II")
    modules = {name: importlib.import_module(name) for name in FINGERPRINTS}
    problem = _problem(modules)
    if problem is not None:
        raise UsageError(problem)
    disable()
    if settings is None:
        return
    try:
        _patch_dropout(modules[AWD_LSTM], settings)
        _patch_weight_dropout(modules[AWD_LSTM], settings)
        _patch_embedding_dropout(modules[AWD_LSTM])
        _patch_decoder(modules[CORE])
        _patch_model(modules[AWD_LSTM])
    except BaseException:
        # Never a half patch.
        disable()
        raise


def disable() -> None:
    """Give fastai's classes their own behaviour back."""
    _patcher.undo()
    _places.clear()


def _problem(modules: Mapping[str, ModuleType]) -> str | None:
    """Why this fastai is not patched, in one line; None if it can be."""
    version = getattr(sys.modules["fastai"], "__version__", "unknown")
    unsupported = _unsupported(version)
    if unsupported is not None:
        return unsupported
    for name, module in modules.items():
        source = source_of(module)
        found = "it has no source" if source is None else difference(source, FINGERPRINTS[name])
        if found is not None:
            return f"{name} of fastai {version} is not the one that can be patched: {found}"
    return None


def _patch_dropout(awd_lstm: Any, settings: Settings) -> None:
    from sd_plugin import functional
    from sd_plugin.kernels import Steps

    stock = awd_lstm.RNNDropout.forward
    batch_first = Steps(1)

    @functools.wraps(stock)
    def forward(self: Any, x: Tensor) -> Any:
        # Case II is fastai's own dropout.
        if not self.training or not 0 < self.p < 1 or settings.case == "II" or not _is_activation(x):
            return stock(self, x)
        site = _places.get(self, "rnn_dropout")
        return functional.dropout(x, self.p, settings.case, batch_first, sampling=settings.sampling, site=site)

    _patcher.set(awd_lstm.RNNDropout, "forward", forward)


def _is_activation(x: Any) -> bool:
    import torch

    return type(x) is torch.Tensor and x.dim() == 3 and x.is_floating_point()


def _patch_weight_dropout(awd_lstm: Any, settings: Settings) -> None:
    import torch

    from sd_plugin import hints

    from ._lstm import structured

    stock = awd_lstm.WeightDropout.forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any) -> Any:
        if not self.training or type(self.module) is not torch.nn.LSTM or not _is_activation(args[0]):
            return stock(self, *args)
        # Dropping units of h_{t-1} takes the place of dropping weights that it is multiplied with.
        units = settings.recurrent and _drops_recurrent_weights(self)
        recurrent_dropout = float(self.weight_p) if units else 0.0
        if not recurrent_dropout and hints.lookup(args[0]) is None:
            return stock(self, *args)
        if not units:
            self._setweights()
        weights = {name: getattr(self, f"{name}_raw") for name in self.layer_names} if units else None
        options = settings.lstm(recurrent_dropout, _places.get(self, "lstm"))
        # Called, not its forward alone: the LSTM's hooks are part of calling the LSTM.
        return structured(self.module, weights, **options)(*args)

    _patcher.set(awd_lstm.WeightDropout, "forward", forward)


def _drops_recurrent_weights(wrapper: Any) -> bool:
    """It drops weights of the recurrent product and no others, in each layer of its LSTM."""
    layers = {f"weight_hh_l{layer}" for layer in range(wrapper.module.num_layers)}
    names = {name.removesuffix("_reverse") for name in wrapper.layer_names}
    return names == layers and 0 <= wrapper.weight_p < 1


def _patch_embedding_dropout(awd_lstm: Any) -> None:
    import torch

    stock = awd_lstm.EmbeddingDropout.forward
    dropout_mask: Callable[..., Tensor] = awd_lstm.dropout_mask

    @functools.wraps(stock)
    def forward(self: Any, words: Tensor, scale: Any = None) -> Any:
        emb = self.emb
        if not self.training or not 0 < self.embed_p < 1:
            return stock(self, words, scale)
        # Renormalised or rescaled rows depend on the whole dropped table, and sparse gradients are of another kind.
        if type(emb) is not torch.nn.Embedding or scale or emb.max_norm is not None or emb.sparse:
            return stock(self, words, scale)
        # One draw per word of the vocabulary, as fastai makes it: the same words are dropped from the same seed.
        mask = dropout_mask(emb.weight.data, (emb.num_embeddings, 1), self.embed_p)
        # fastai's own stand-in for no padding is the last word, which then gets no gradient here.
        padding = -1 if emb.padding_idx is None else emb.padding_idx
        rows = torch.nn.functional.embedding(words, emb.weight, padding, scale_grad_by_freq=emb.scale_grad_by_freq)
        return rows * mask[words]

    _patcher.set(awd_lstm.EmbeddingDropout, "forward", forward)


def _patch_decoder(core: Any) -> None:
    import torch

    from sd_plugin import hints
    from sd_plugin.linear import StructuredLinear

    @functools.wraps(core.LinearDecoder.forward)
    def forward(self: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _places[self.output_dp] = "output_dp"
        dropped = self.output_dp(input)
        decoder: nn.Module = self.decoder
        hinted = type(dropped) is torch.Tensor and hints.lookup(dropped) is not None
        if hinted and type(decoder) is torch.nn.Linear:
            # For this call only, with the decoder's own parameters and hooks.
            skipping = StructuredLinear.__new__(StructuredLinear)
            skipping.__dict__.update(decoder.__dict__)
            decoder = skipping
        return decoder(dropped), input, dropped

    _patcher.set(core.LinearDecoder, "forward", forward)


def _patch_model(awd_lstm: Any) -> None:
    stock = awd_lstm.AWD_LSTM.forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            _places[self.input_dp] = "input_dp"
            for layer, (rnn, dropout) in enumerate(zip(self.rnns, self.hidden_dps, strict=True)):
                _places[rnn], _places[dropout] = f"rnns.{layer}", f"hidden_dps.{layer}"
        return stock(self, *args, **kwargs)

    _patcher.set(awd_lstm.AWD_LSTM, "forward", forward)
