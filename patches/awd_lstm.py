"""salesforce/awd-lstm-lm: structured dropout in its weight drop, locked dropout, embedding and loss.

In a structured mode:

- ``locked_dropout.LockedDropout`` keeps the same units for the whole batch at each time step, and tells the product
  that follows;
- ``weight_drop.WeightDrop`` of an ``nn.LSTM`` drops units of :math:`h_{t-1}` inside the recurrent product instead of
  weights (``nr_rh_st``), or weights as the host does (``nr_st``); its product with the input skips;
- ``embed_regularize.embedded_dropout`` drops the same words, but touches only the rows that are looked up;
- ``splitcross.SplitCrossEntropyLoss`` with one split (PTB, WikiText-2) skips, and does not hold the log-softmax;
- ``torch.nn.LSTM`` without weight drop (``--wdrop 0``) skips.

In mode ``random`` nothing of that changes. In all modes the host is made to run on a modern torch
(:mod:`._awd_lstm_torch`, and weight drop, which sets a parameter where torch refuses it).

Emitted states stay undropped, so that the host's activation regularisation and carried state mean what they did.
Nothing is stored in the host's objects, which it pickles whole.

Source: Sarma et al. 2021 (arXiv 2106.12089), table 1; Merity et al. 2017 (arXiv 1708.02182).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sd_plugin._environment import read_case, read_switch
from sd_plugin.errors import UsageError

from ._checkout import Checkout
from ._fingerprint import Function
from ._host import Finding, Host, refusal
from ._patcher import Patcher
from ._settings import Settings, checked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ._host_files import Programs

CHECKOUT = Checkout(
    name="awd-lstm-lm",
    origin="https://github.com/salesforce/awd-lstm-lm",
    commit="1d466ec5875675ca6b6f0caacbb741240a29da9e",
    variable="AWD_LSTM_DIR",
    fingerprints={
        "weight_drop.py": {
            "WeightDrop.__init__": Function.of("self module weights dropout variational"),
            "WeightDrop.widget_demagnetizer_y2k_edition": Function.of("*args **kwargs"),
            "WeightDrop._setup": Function.of("self", "register_parameter", "_parameters", "weights"),
            "WeightDrop._setweights": Function.of("self", "setattr", "variational", "training", "dropout"),
            "WeightDrop.forward": Function.of("self *args", "_setweights", "module"),
        },
        "locked_dropout.py": {
            "LockedDropout.forward": Function.of("self x dropout", "bernoulli_", "training", "expand_as"),
        },
        "embed_regularize.py": {
            "embedded_dropout": Function.of("embed words dropout scale", "bernoulli_", "embedding", "padding_idx"),
        },
        "splitcross.py": {
            "SplitCrossEntropyLoss.__init__": Function.of("self hidden_size splits verbose", "nsplits", "stats"),
            "SplitCrossEntropyLoss.forward": Function.of(
                "self weight bias hiddens targets verbose", "split_on_targets", "log_softmax", "nsplits"
            ),
        },
        "model.py": {
            "RNNModel.__init__": Function.of(
                "self rnn_type ntoken ninp nhid nlayers dropout dropouth dropouti dropoute wdrop tie_weights",
                "LockedDropout",
                "WeightDrop",
            ),
            "RNNModel.forward": Function.of(
                "self input hidden return_h", "embedded_dropout", "lockdrop", "rnns", "dropouti", "dropouth"
            ),
        },
        "utils.py": {"get_batch": Function.of("source i args seq_len evaluation")},
        "data.py": {"Corpus.__init__": Function.of("self path")},
    },
)

#: Modules of other programs bear these names too.
ORDINARY_NAMES = ("data", "model")
MODULES = ("data", "embed_regularize", "locked_dropout", "weight_drop", "model", "splitcross")


_patcher = Patcher()


def _find(environ: Mapping[str, str]) -> list[Finding]:
    return CHECKOUT.find(environ)


HOST = Host(
    name="awd_lstm",
    title="salesforce/awd-lstm-lm",
    modules=MODULES,
    supported=f"checkouts whose patched functions are those of commit {CHECKOUT.commit[:10]}",
    located=f"run in its checkout, or named by {CHECKOUT.variable}",
    find=_find,
    enabled=lambda: bool(_patcher),
    refuses=lambda mode, case, recurrent: refusal(checked, mode, case, "exact", "II"),
)


class Places:
    """Names for the report: the host has one dropout module for all of its places.

    `RNNModel.forward` announces what comes, in order; outside of it a place has the module's own name.
    """

    def __init__(self) -> None:
        self._dropouts: list[str] = []
        # By identity of living modules, because whole models are pickled.
        self._rnns: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def announce(self, model: Any) -> None:
        """A forward pass of the host's ``RNNModel`` begins."""
        between = [f"rnns.{layer}.input" for layer in range(1, len(model.rnns))]
        self._dropouts = ["output", *reversed(between), "embedding"]
        for layer, rnn in enumerate(model.rnns):
            self._rnns[rnn] = f"rnns.{layer}"

    def forget(self) -> None:
        """The forward pass is over."""
        self._dropouts = []

    def dropout(self) -> str:
        """The place of the dropout that is called now."""
        return self._dropouts.pop() if self._dropouts else "locked_dropout"

    def knows(self, module: Any) -> bool:
        """It is a recurrent layer of the host's model."""
        return module in self._rnns

    def rnn(self, module: Any) -> str:
        """The place of a recurrent layer."""
        return self._rnns.get(module, "lstm")


_places = Places()


def on_import(module: ModuleType) -> None:
    """Patch the host at the first of its modules; later calls come from a reload.

    Raises:
        UsageError: the module is not that of the host, though its name is the host's alone.
    """
    global _enabling
    switch = read_switch(os.environ)
    path = getattr(module, "__file__", None)
    if _enabling or path is None or not switch.replaces("awd_lstm"):
        return
    folder = Path(path).parent
    if module.__name__ in ORDINARY_NAMES and not (folder / "weight_drop.py").is_file():
        return
    # It imports the others; when it is complete, its own turn comes.
    model = sys.modules.get("model")
    if model is not None and getattr(model.__spec__, "_initializing", False) and module is not model:
        return
    problem = CHECKOUT.problem(folder)
    if problem is not None:
        raise UsageError(problem)
    enable(mode=switch.mode or "nr_rh_st", case=read_case(os.environ), folder=folder)


_enabling = False


def enable(
    mode: str = "nr_rh_st", case: str | None = None, sampling: str = "exact", folder: Path | str | None = None
) -> None:
    """Patch the checkout that is on ``sys.path``.

    Args:
        mode: ``nr_rh_st``, ``nr_st``, or ``random``: the host's own dropout, only made to run on a modern torch.
        case: of the paper's Fig. 1, how ``nr_rh_st`` and ``nr_st`` drop units; None for III. Mode ``random`` is II.
        sampling: ``exact`` or ``bernoulli``; see :func:`sd_plugin.patterns.draw_kept`.
        folder: the checkout; None for the one that ``import weight_drop`` would find.

    Raises:
        UsageError: an argument is not valid, or the checkout is not there or not the host. Nothing is patched then.
    """
    global _enabling
    settings = checked(mode, case, sampling, own_case="II")
    found = _folder_on_path() if folder is None else Path(folder)
    problem = CHECKOUT.problem(found)
    if problem is not None:
        raise UsageError(problem)
    disable()
    _enabling = True
    try:
        modules = {name: _imported(name, found) for name in (*MODULES, "utils")}
        _patch(modules, found, settings)
    except BaseException:
        # Never a half patch.
        disable()
        raise
    finally:
        _enabling = False


def disable() -> None:
    """Give the host's classes and functions, and torch's, back their own behaviour."""
    _patcher.undo()
    _places.forget()


def changes() -> tuple[str, ...]:
    """What is patched now, by qualified name."""
    return _patcher.changes


def _folder_on_path() -> Path:
    spec = importlib.util.find_spec("weight_drop")
    if spec is None or spec.origin is None:
        raise UsageError("no module weight_drop was found: run in a checkout of awd-lstm-lm, or put it on sys.path")
    return Path(spec.origin).parent


def _imported(name: str, folder: Path) -> ModuleType:
    """The host's module of that name, imported.

    Raises:
        UsageError: another module of that name is, or comes, first.
    """
    module = importlib.import_module(name)
    path = getattr(module, "__file__", None)
    if path is None or Path(path).resolve().parent != folder.resolve():
        raise UsageError(f"import {name} finds {path}, not that of {folder}")
    return module


def _patch(modules: Mapping[str, Any], folder: Path, settings: Settings | None) -> None:
    from . import _awd_lstm_torch, _host_files

    programs = _host_files.Programs(folder)
    _awd_lstm_torch.patch(_patcher, programs)
    _patch_model(modules["model"].RNNModel, programs)
    for weight_drop in _definitions(modules, "weight_drop", "WeightDrop"):
        _patcher.set(weight_drop, "_setweights", _set_weights)
        if settings is not None:
            _patch_weight_drop(weight_drop, settings)
    if settings is None:
        return
    for locked_dropout in _definitions(modules, "locked_dropout", "LockedDropout"):
        _patch_locked_dropout(locked_dropout, settings)
    # model.py has bound the function by name.
    embedded_dropout = _embedded_dropout(modules["embed_regularize"].embedded_dropout)
    for module in (modules["embed_regularize"], modules["model"]):
        _patcher.set(module, "embedded_dropout", embedded_dropout)
    _patch_loss(modules["splitcross"].SplitCrossEntropyLoss)
    _patch_lstm(settings)


def _definitions(modules: Mapping[str, Any], module: str, name: str) -> set[Any]:
    """A class of the host: the module's, and that which ``model`` has bound, another one after a reload."""
    return {getattr(modules[module], name), getattr(modules["model"], name)}


def _patch_model(model: Any, programs: Programs) -> None:
    """Names for the places of dropout; and logits, which only ``main.py`` does without."""
    from sd_plugin import functional

    from ._awd_lstm_torch import SIDE_PROGRAMS

    stock = model.forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _places.announce(self)
        try:
            result, *rest = stock(self, *args, **kwargs)
        finally:
            _places.forget()
        if programs.running() in SIDE_PROGRAMS:
            result = functional.linear(result, self.decoder.weight, self.decoder.bias)
        return (result, *rest)

    _patcher.set(model, "forward", forward)


def _set_weights(self: Any) -> None:
    """The host's weight drop, without setting a parameter where torch allows none (in evaluation it is one)."""
    for name in self.weights:
        # A program without this patch may have left a parameter of this name in a checkpoint.
        self.module._parameters.pop(name, None)
        setattr(self.module, name, _dropped_weight(self, name))


def _dropped_weight(self: Any, name: str) -> Tensor:
    """One weight of a ``WeightDrop`` as the host drops it; never the parameter itself."""
    import torch

    raw: Tensor = getattr(self.module, f"{name}_raw")
    if self.variational:
        rows = torch.nn.functional.dropout(raw.new_ones(raw.shape[0], 1), p=self.dropout, training=True)
        whole: Tensor = rows.expand_as(raw) * raw
        return whole
    weight = torch.nn.functional.dropout(raw, p=self.dropout, training=self.training)
    return raw.view_as(raw) if weight is raw else weight


def _patch_weight_drop(weight_drop: Any, settings: Settings) -> None:
    import torch

    from ._lstm import stock as stock_lstm
    from ._lstm import structured

    stock = weight_drop.forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any) -> Any:
        if type(self.module) is not torch.nn.LSTM:
            return stock(self, *args)
        # Dropping units of h_{t-1} takes the place of dropping weights that it is multiplied with.
        units = settings.recurrent and _drops_recurrent_weights(self)
        weights = {
            name: getattr(self.module, f"{name}_raw") if units else _dropped_weight(self, name) for name in self.weights
        }
        if not self.training:
            return stock_lstm(self.module, weights).forward(*args)
        options = settings.lstm(float(self.dropout) if units else 0.0, _places.rnn(self))
        return structured(self.module, weights, **options).forward(*args)

    _patcher.set(weight_drop, "forward", forward)


def _drops_recurrent_weights(self: Any) -> bool:
    """A ``WeightDrop`` of the recurrent weights and no others, in each layer of its LSTM."""
    layers = {f"weight_hh_l{layer}" for layer in range(self.module.num_layers)}
    return {name.removesuffix("_reverse") for name in self.weights} == layers and 0 <= self.dropout < 1


def _patch_locked_dropout(locked_dropout: Any, settings: Settings) -> None:
    from sd_plugin import functional
    from sd_plugin.kernels import TIME_MAJOR

    stock = locked_dropout.forward

    @functools.wraps(stock)
    def forward(self: nn.Module, x: Tensor, dropout: float = 0.5) -> Tensor:
        site = _places.dropout()
        if not self.training or not dropout:
            return x
        return functional.dropout(x, dropout, settings.case, TIME_MAJOR, sampling=settings.sampling, site=site)

    _patcher.set(locked_dropout, "forward", forward)


def _embedded_dropout(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    import torch

    @functools.wraps(stock)
    def embedded_dropout(embed: Any, words: Tensor, dropout: float = 0.1, scale: Any = None) -> Tensor:
        # Renormalised or rescaled rows depend on the whole dropped table.
        if not dropout or scale is not None or embed.max_norm is not None:
            return stock(embed, words, dropout, scale)
        weight = embed.weight
        # One draw per word type, as the host makes it: the same words are dropped from the same seed.
        mask = weight.data.new_empty(weight.shape[0], 1).bernoulli_(1 - dropout) / (1 - dropout)
        # The host's own stand-in for no padding is the last word, which then gets no gradient here.
        padding = -1 if embed.padding_idx is None else embed.padding_idx
        rows: Tensor = torch.nn.functional.embedding(
            words, weight, padding, None, embed.norm_type, embed.scale_grad_by_freq, embed.sparse
        )
        kept: Tensor = mask[words]
        return rows * kept

    return embedded_dropout


def _patch_loss(loss: Any) -> None:
    from sd_plugin import functional
    from sd_plugin.loss import FusedCrossEntropyLoss

    stock: Callable[..., Tensor] = loss.forward
    of_rows = FusedCrossEntropyLoss(reduction="none")

    @functools.wraps(stock)
    def forward(
        self: Any, weight: Tensor, bias: Tensor, hiddens: Tensor, targets: Tensor, verbose: bool = False
    ) -> Tensor:
        # More splits sort the rows by their targets, which mixes time steps; verbose counts what the host computes.
        if self.nsplits > 1 or self.verbose or verbose:
            return stock(self, weight, bias, hiddens, targets, verbose)
        rows = hiddens.view(-1, hiddens.size(2)) if hiddens.dim() > 2 else hiddens
        losses: Tensor = of_rows(functional.linear(rows, weight, bias), targets)
        return (losses.float().sum() / len(targets)).type_as(weight)

    _patcher.set(loss, "forward", forward)


def _patch_lstm(settings: Settings) -> None:
    import torch

    from sd_plugin import hints

    from ._lstm import structured

    stock = torch.nn.LSTM.forward

    @functools.wraps(stock)
    def forward(self: nn.LSTM, input: Any, hx: Any = None) -> Any:
        # The host's own, not every LSTM of the process.
        if not (_places.knows(self) and self.training and hints.lookup(input) is not None):
            return stock(self, input, hx)
        return structured(self, **settings.lstm(0.0, _places.rnn(self))).forward(input, hx)

    _patcher.set(torch.nn.LSTM, "forward", forward)
