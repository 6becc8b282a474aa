"""achernodub/targer (named entity recognition): structured dropout before and inside its BiLSTM.

| host | change, in training |
|---|---|
| the four taggers | what they drop ahead of the BiLSTM (words, characters) is dropped at its input ``z`` instead |
| ``LayerBiLSTM.forward`` | products skip what was dropped of ``z``; recurrent dropout in both directions |
| ``torch.load`` | the host's own calls trust its own files: torch >= 2.6 refuses whole pickled objects |
| ``torch.save`` | the host's own calls write to a temporary name first: an interrupted save loses nothing |

``z`` is the concatenation of word embeddings and character CNN. In the modes of the paper it is dropped at random
(``random``, its baseline) or structured (``nr_st``); ``nr_rh_st`` adds the recurrent dropout. Evaluation is the host's
own, and so is what it drops after the BiLSTM. A tagger of another ``--rnn-type`` stays as it is, with a warning.

The host pickles its taggers whole, so nothing is stored in them and no class changes: their files load without this.

Source: Sarma et al. 2021 (arXiv 2106.12089), its NER experiments; the host implements Ma and Hovy 2016 (arXiv
1603.01354).
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sd_plugin._environment import CASES, MODES, read_case, read_recurrent_dropout, read_switch
from sd_plugin.errors import UsageError

from ._checkout import Checkout
from ._fingerprint import Function
from ._host import Host, refusal
from ._patcher import Patcher
from ._settings import check

if TYPE_CHECKING:
    from torch import Tensor

CHECKOUT = Checkout(
    name="targer",
    origin="https://github.com/achernodub/targer",
    commit="25d196c645711e68e9fe874ca7e98475e31e493d",
    variable="TARGER_DIR",
    fingerprints={
        "src/models/tagger_birnn_cnn_crf.py": {
            "TaggerBiRNNCNNCRF._forward_birnn": Function.of(
                "self word_sequences", "dropout", "birnn_layer", "apply_mask", "lin_layer", "char_cnn_layer"
            ),
        },
        "src/models/tagger_birnn_crf.py": {
            "TaggerBiRNNCRF._forward_birnn": Function.of(
                "self word_sequences", "dropout", "birnn_layer", "apply_mask", "lin_layer"
            ),
        },
        "src/models/tagger_birnn_cnn.py": {
            "TaggerBiRNNCNN.forward": Function.of(
                "self word_sequences", "dropout", "birnn_layer", "apply_mask", "lin_layer", "char_cnn_layer"
            ),
        },
        "src/models/tagger_birnn.py": {
            "TaggerBiRNN.forward": Function.of(
                "self word_sequences", "dropout", "birnn_layer", "apply_mask", "lin_layer"
            ),
        },
        "src/models/tagger_base.py": {
            "TaggerBase.save_tagger": Function.of("self checkpoint_fn", "torch", "save"),
        },
        "src/layers/layer_bilstm.py": {
            "LayerBiLSTM.__init__": Function.of("self input_dim hidden_dim gpu", "LSTM", "rnn"),
            "LayerBiLSTM.forward": Function.of("self input_tensor mask_tensor", "pack", "rnn", "unpack"),
        },
        "src/layers/layer_birnn_base.py": {
            "LayerBiRNNBase.pack": Function.of(
                "self input_tensor mask_tensor", "index_select", "pack_padded_sequence", "sort_by_seq_len_list"
            ),
        },
        "src/factories/factory_tagger.py": {
            "TaggerFactory.load": Function.of("checkpoint_fn gpu", "torch", "load"),
        },
    },
    needed=("main.py", "conlleval"),
)

#: The taggers: module, class, and the method that leads through the BiLSTM. The first is the paper's.
TAGGERS = (
    ("src.models.tagger_birnn_cnn_crf", "TaggerBiRNNCNNCRF", "_forward_birnn"),
    ("src.models.tagger_birnn_crf", "TaggerBiRNNCRF", "_forward_birnn"),
    ("src.models.tagger_birnn_cnn", "TaggerBiRNNCNN", "forward"),
    ("src.models.tagger_birnn", "TaggerBiRNN", "forward"),
)
_MAIN_MODULE = TAGGERS[0][0]
_LAYER_MODULE = "src.layers.layer_bilstm"

_patcher = Patcher()
# Apart, because the host needs these on a modern torch with and without structured dropout.
_file_patcher = Patcher()


HOST = Host(
    name="targer",
    title="achernodub/targer",
    # Its factory imports this module last of the taggers, and both programs import the factory.
    modules=(_MAIN_MODULE,),
    supported=f"checkouts whose patched functions are those of commit {CHECKOUT.commit[:10]}",
    located=f"run in its checkout, or named by {CHECKOUT.variable}",
    find=CHECKOUT.find,
    enabled=lambda: bool(_patcher),
    refuses=lambda mode, case, recurrent_dropout: refusal(Settings.of, mode, case, recurrent_dropout),
)


@dataclass(frozen=True)
class Settings:
    """How units are dropped.

    Attributes:
        mode: ``random``, ``nr_st`` or ``nr_rh_st``.
        case: of the paper's Fig. 1.
        recurrent_dropout: probability for the recurrent state; None for that of the tagger's own dropout.
    """

    mode: str
    case: str
    recurrent_dropout: float | None

    @classmethod
    def of(cls, mode: str | None, case: str | None, recurrent_dropout: float | None) -> Settings:
        """From the arguments of :func:`enable`; errors as there."""
        mode = "nr_rh_st" if mode is None else mode
        check("mode", mode, MODES)
        valid = ("I", "II") if mode == "random" else ("III", "IV")
        if case is not None:
            check("case", case, CASES)
        if case is not None and case not in valid:
            raise UsageError(f"mode {mode} has the cases {' and '.join(valid)}, not {case}")
        p = recurrent_dropout
        if p is not None and not 0.0 <= p < 1.0:
            raise UsageError(f"recurrent_dropout must be in [0, 1), got {p}")
        if p and mode == "nr_st":
            raise UsageError("mode nr_st has no recurrent dropout; use nr_rh_st")
        if mode != "nr_rh_st" and p is None:
            p = 0.0
        return cls(mode, case or valid[0], p)

    def recurrent(self, dropout: float) -> float:
        """The recurrent dropout of a tagger that itself drops with this probability."""
        return dropout if self.recurrent_dropout is None else self.recurrent_dropout

    def __str__(self) -> str:
        how = "at random" if self.mode == "random" else "structured"
        p = self.recurrent_dropout
        recurrent = "the same probability" if p is None else f"{p:g}" if p else "none"
        return (
            f"mode {self.mode}, case {self.case}: dropout ahead of the BiLSTM moved to its input, {how}; "
            f"recurrent dropout: {recurrent}"
        )


def on_import(module: ModuleType) -> None:
    """Patch the host right after its import; what to do is in the environment.

    Raises:
        UsageError: the module is not that of the host. ValueError: a variable of the environment is not understood.
    """
    switch = read_switch(os.environ)
    if switch.replaces("targer"):
        enable(mode=switch.mode, case=read_case(os.environ), recurrent_dropout=read_recurrent_dropout(os.environ))


def enable(mode: str | None = None, case: str | None = None, recurrent_dropout: float | None = None) -> None:
    """Patch the checkout that is on ``sys.path``.

    Args:
        mode: ``random``, ``nr_st`` or ``nr_rh_st``; None for the last.
        case: of the paper's Fig. 1, I or II in mode ``random``, III or IV in the others; None for I and III.
        recurrent_dropout: probability in [0, 1) for the recurrent state, in both directions. None for the tagger's
            own (``--dropout-ratio``) in ``nr_rh_st`` and for 0 in the others; ``nr_st`` takes no other.

    Raises:
        UsageError: an argument is not valid, or the checkout is not there or not the host. Nothing is patched then.
    """
    settings = Settings.of(mode, case, recurrent_dropout)
    folder = _folder()
    problem = CHECKOUT.problem(folder)
    if problem is not None:
        raise UsageError(problem)
    disable()
    try:
        patch_files(folder)
        layer = _imported(_LAYER_MODULE, folder).LayerBiLSTM
        _patch_layer(layer, settings)
        for module, name, method in TAGGERS:
            _patch_tagger(getattr(_imported(module, folder), name), method, layer, settings)
    except BaseException:
        # Never a half patch.
        disable()
        raise


def disable() -> None:
    """Give the host's classes, and torch's functions, back their own behaviour."""
    _patcher.undo()
    _file_patcher.undo()


def changes() -> tuple[str, ...]:
    """What is patched now, by qualified name."""
    return (*_file_patcher.changes, *_patcher.changes)


def _folder() -> Path:
    """The checkout that an import finds."""
    try:
        module = importlib.import_module(_MAIN_MODULE)
    except ModuleNotFoundError as error:
        # A module that the host needs and that is not installed is another matter.
        if error.name is None or not f"{_MAIN_MODULE}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"no module {_MAIN_MODULE} was found: run in a checkout of targer, or put it on sys.path"
        ) from None
    path = getattr(module, "__file__", None)
    if path is None:
        raise UsageError(f"{_MAIN_MODULE} is not that of targer: it comes from no file")
    return Path(path).resolve().parents[2]


def _imported(name: str, folder: Path) -> ModuleType:
    """The host's module of that name, imported.

    Raises:
        UsageError: another module of that name is, or comes, first.
    """
    module = importlib.import_module(name)
    path = getattr(module, "__file__", None)
    if path is None or not Path(path).resolve().is_relative_to(folder):
        raise UsageError(f"import {name} finds {path}, not that of {folder}")
    return module


class _Instead:
    """A host's object with some of its attributes replaced, for one call of one of the host's own functions."""

    def __init__(self, whole: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._whole, name, value)


# Recurrent dropout for the BiLSTM whose tagger is about to call it. Never in the layer itself, which is pickled.
_announced: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


def _patch_tagger(tagger: Any, method: str, layer: Any, settings: Settings) -> None:
    stock: Callable[[Any, Any], Tensor] = getattr(tagger, method)

    @functools.wraps(stock)
    def forward(self: Any, word_sequences: Any) -> Tensor:
        if not self.training:
            return stock(self, word_sequences)
        if not isinstance(self.birnn_layer, layer):
            warnings.warn(
                f"sd-plugin: rnn_type {self.rnn_type} stays as it is: only LSTM has structured dropout", stacklevel=2
            )
            return stock(self, word_sequences)
        return stock(_with_dropout_at_the_lstm(self, settings), word_sequences)

    _patcher.set(tagger, method, forward)


def _with_dropout_at_the_lstm(tagger: Any, settings: Settings) -> _Instead:
    """The tagger, for one pass: nothing is dropped before the BiLSTM's input is, and the rest is the host's own."""
    ahead = True

    def dropout(x: Tensor) -> Tensor:
        return x if ahead else tagger.dropout(x)

    def birnn_layer(z: Tensor, mask: Tensor) -> Tensor:
        nonlocal ahead
        ahead = False
        _announced[tagger.birnn_layer] = settings.recurrent(tagger.dropout.p)
        result: Tensor = tagger.birnn_layer(_drop(z, tagger.dropout, settings.case), mask)
        return result

    return _Instead(tagger, dropout=dropout, birnn_layer=birnn_layer)


def _drop(z: Tensor, dropout: Callable[[Tensor], Tensor], case: str) -> Tensor:
    """``z`` ``[B, T, K]`` dropped with the probability of the host's own module."""
    from sd_plugin import functional
    from sd_plugin.kernels import Steps

    if case == "I":
        return dropout(z)
    p: float = dropout.p  # type: ignore[attr-defined]
    return functional.dropout(z, p, case, Steps(1), site="birnn.input")


def _patch_layer(layer: Any, settings: Settings) -> None:
    from sd_plugin import hints

    from ._lstm import structured

    stock: Callable[[Any, Tensor, Tensor], Tensor] = layer.forward

    @functools.wraps(stock)
    def forward(self: Any, input_tensor: Tensor, mask_tensor: Tensor) -> Tensor:
        p = _announced.pop(self, 0.0)
        if not self.training or (p == 0 and hints.lookup(input_tensor) is None):
            return stock(self, input_tensor, mask_tensor)
        mode = "random" if settings.mode == "random" else "nr_rh_st"
        rnn = structured(self.rnn, recurrent_dropout=p, mode=mode, locked=settings.case in ("II", "IV"), site="birnn")
        return stock(_Instead(self, rnn=rnn, pack=functools.partial(_pack, self)), input_tensor, mask_tensor)

    _patcher.set(layer, "forward", forward)


def _pack(layer: Any, input_tensor: Tensor, mask_tensor: Tensor) -> tuple[Any, Tensor]:
    """The host's ``pack``, which sorts the rows by length: at each time step they have the same zero columns still."""
    from sd_plugin import hints
    from sd_plugin.kernels import Steps

    packed, order = layer.pack(input_tensor, mask_tensor)
    hints.carry(input_tensor, Steps(1), packed.data, Steps.packed(packed.batch_sizes.tolist()))
    return packed, order


def patch_files(folder: Path) -> None:
    """Only what the host's files need: a modern torch reads them, and an interrupted save leaves the former one.

    Args:
        folder: the checkout. Calls of ``torch.load`` and ``torch.save`` from anywhere else stay as they are.
    """
    from . import _host_files

    _file_patcher.undo()
    _host_files.patch(_file_patcher, _host_files.Programs(folder, packages=("src",)), CHECKOUT.name)
