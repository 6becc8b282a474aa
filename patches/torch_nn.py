"""Any program built from `nn.LSTM`, `nn.Dropout` and `nn.Linear`: structured dropout without a change to it.

| torch | in training |
|---|---|
| ``nn.Dropout`` | 3-D activations of an LSTM's width are dropped by the chosen case, with a hint for what follows |
| ``nn.LSTM`` | uses that hint; its ``dropout`` likewise; ``nr_rh_st`` drops units of :math:`h_{t-1}` too |
| ``nn.Linear``, ``torch.addmm`` | use the hint of their input; ``addmm`` is what projections written by hand call |
| ``nn.utils.rnn.pack_padded_sequence`` | carries the hint over |
| ``nn.RNNBase`` | tells which LSTMs there are |
| ``torch.jit.script`` | compiles torch's own code |

In mode ``random``, and in eval mode, torch is left as it is.

Recurrent dropout in ``nr_rh_st``, unless ``recurrent_dropout`` says otherwise, has the probability of the dropout
around the LSTM, as in the paper: its own ``dropout`` if it has several layers, else that of the `nn.Dropout` which its
input comes from.

An activation's time dimension is that of the living LSTMs which take or give its width. Where these differ in
``batch_first``, the option of that name decides, or the dropout stays torch's, with a warning.

What stays torch's: `F.dropout`, subclasses of `nn.Dropout` and `nn.LSTM` (parametrized LSTMs among them), activations
of other than three dimensions or of no LSTM's width, subclasses of `torch.Tensor`, and what `torch.compile`, ``trace``
or ``script`` captures. Products written as ``F.linear``, ``@`` or ``matmul`` are dense, and the hint counted as lost;
`F.linear` is not replaced because tensor subclasses and quantization know it by identity. A name imported by ``from
torch… import`` before the patch is torch's too.

What has an LSTM's width is taken for one's activation, be it a transformer's. No double backward, no ``torch.func``.

Nothing is stored in modules, so that a model pickled whole loads without this package.

Source: Sarma et al. 2021 (arXiv 2106.12089), section 3; Zaremba et al. 2014 (arXiv 1409.2329).
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sd_plugin._environment import CASES, MODES, read_case, read_recurrent_dropout, read_switch
from sd_plugin._tested import TORCH, release
from sd_plugin.errors import UsageError

from . import _settings as shared_settings
from ._host import Finding, Host, find_distribution, refusal
from ._patcher import Patcher

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.utils.rnn import PackedSequence

    from sd_plugin.hints import Hint
    from sd_plugin.kernels import Kept

_patcher = Patcher()


def _unsupported(version: str) -> str | None:
    found = release(version)
    if found is not None and found >= TORCH[0]:
        return None
    return f"torch {version} is not supported; supported: {HOST.supported}"


def _find(environ: Mapping[str, str]) -> list[Finding]:
    return find_distribution("torch", _unsupported)


HOST = Host(
    name="torch_nn",
    title="any program on torch.nn",
    modules=("torch",),
    supported=f"torch {TORCH[0][0]}.{TORCH[0][1]} or later",
    located="asked for with SD_PLUGIN_TARGETS=torch",
    find=_find,
    enabled=lambda: bool(_patcher),
    refuses=lambda mode, case, recurrent_dropout: (
        "mode random leaves torch as it is"
        if mode == "random"
        else refusal(_settings, mode, case, "exact", recurrent_dropout, None)
    ),
)


@dataclass(frozen=True)
class Settings(shared_settings.Settings):
    """How units are dropped.

    Attributes:
        recurrent_dropout: of units of the recurrent state; None for that of the dropout around the LSTM.
        batch_first: the layout of activations; None for that of the LSTMs of their width.
    """

    recurrent_dropout: float | None
    batch_first: bool | None


class LivingLSTMs:
    """The program's LSTMs, which tell an activation's layout by its width."""

    def __init__(self) -> None:
        # A list, because threads may look while another adds.
        self._references: list[weakref.ref[nn.LSTM]] = []

    def add(self, lstm: nn.LSTM) -> None:
        """Remember ``lstm`` while it lives."""
        self._references.append(weakref.ref(lstm, self._references.remove))

    def find(self) -> None:
        """Remember those that exist already."""
        import torch

        for thing in gc.get_objects():
            # Not isinstance, which asks objects that only claim to be something, and runs their code.
            if issubclass(type(thing), torch.nn.LSTM):
                self.add(thing)

    def forget(self) -> None:
        """Remember none."""
        self._references = []

    def layouts(self, width: int) -> set[bool]:
        """``batch_first`` of the LSTMs that can use a hint and take or give ``width`` units."""
        import torch

        from sd_plugin.lstm import StructuredDropoutLSTM

        found = (reference() for reference in tuple(self._references))
        return {
            lstm.batch_first
            for lstm in found
            if lstm is not None
            and type(lstm) in (torch.nn.LSTM, StructuredDropoutLSTM)
            and lstm.proj_size == 0
            and width in (lstm.input_size, lstm.hidden_size * (1 + lstm.bidirectional))
        }


_lstms = LivingLSTMs()
#: Drawn patterns that a hint still holds -> the probability they were drawn with.
_probabilities: weakref.WeakKeyDictionary[Kept, float] = weakref.WeakKeyDictionary()
_warned = False


def on_import(module: ModuleType) -> None:
    """Patch torch right after its import, if the environment asks for it."""
    switch = read_switch(os.environ)
    if switch.replaces("torch"):
        enable(
            mode=switch.mode or "nr_rh_st",
            case=read_case(os.environ),
            recurrent_dropout=read_recurrent_dropout(os.environ),
        )


def enable(
    mode: str = "nr_rh_st",
    case: str | None = None,
    sampling: str = "exact",
    recurrent_dropout: float | None = None,
    batch_first: bool | None = None,
) -> None:
    """Give all `nn.LSTM`, `nn.Dropout` and `nn.Linear` modules structured dropout, those that exist included.

    Args:
        mode: ``nr_rh_st``, ``nr_st`` (no recurrent dropout), or ``random``: torch as it is, nothing patched.
        case: of the paper's Fig. 1, how ``nr_rh_st`` and ``nr_st`` drop units; None for III. Mode ``random`` is I.
        sampling: ``exact`` or ``bernoulli``; see :func:`sd_plugin.patterns.draw_kept`.
        recurrent_dropout: in [0, 1), for every LSTM; None for the probability of the dropout around it.
        batch_first: activations are ``[B, T, K]`` (True) or ``[T, B, K]``; None for as their LSTMs have it.

    Raises:
        UsageError: an argument is not valid or without effect in ``mode``, or this torch is not one that can be
            patched. Nothing is patched then.
    """
    global _warned
    settings = _settings(mode, case, sampling, recurrent_dropout, batch_first)
    disable()
    if settings is None:
        return
    changes = _changes(settings)
    _warned = False
    _lstms.find()
    try:
        for change in changes:
            _patcher.set(change.owner, change.name, change.replacement)
    except BaseException:
        # Never a half patch.
        disable()
        raise


def disable() -> None:
    """Give torch its own behaviour back."""
    _patcher.undo()
    _lstms.forget()


def _settings(
    mode: str, case: str | None, sampling: str, recurrent_dropout: float | None, batch_first: bool | None
) -> Settings | None:
    """None for torch's own dropout."""
    if mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if case is not None and case not in CASES:
        raise UsageError(f"case must be one of {', '.join(CASES)}, got {case!r}")
    if sampling != "exact":
        # Not imported for the default, that of the start-up hook: torch may be under import because this is.
        from sd_plugin.patterns import SAMPLINGS

        if sampling not in SAMPLINGS:
            raise UsageError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if recurrent_dropout is not None and not _is_probability(recurrent_dropout):
        raise UsageError(f"recurrent_dropout must be a number in [0, 1), got {recurrent_dropout!r}")
    if recurrent_dropout and mode != "nr_rh_st":
        raise UsageError(f"mode {mode} has no recurrent dropout; use nr_rh_st, or leave recurrent_dropout out")
    if mode == "random":
        if case not in (None, "I"):
            raise UsageError(f"mode random is torch's own dropout, case I; case {case} needs nr_st or nr_rh_st")
        return None
    return Settings(mode == "nr_rh_st", case or "III", sampling, recurrent_dropout, batch_first)


def _is_probability(p: object) -> bool:
    """It is a number in [0, 1)."""
    return isinstance(p, (int, float)) and 0 <= p < 1


@dataclass(frozen=True)
class Change:
    """One attribute of torch, what it is, and what takes its place."""

    owner: Any
    name: str
    stock: Any
    replacement: Any


def _changes(settings: Settings) -> list[Change]:
    """All replacements, none of them made yet.

    Raises:
        UsageError: this torch is too old, or has not the functions that they were written for.
    """
    import torch

    problem = _unsupported(torch.__version__)
    if problem is not None:
        raise UsageError(problem)
    table: list[tuple[Any, str, str | None, Callable[[Any], Any]]] = [
        (torch.nn.RNNBase, "__init__", None, _remembering),
        (torch.nn.RNNBase, "__setstate__", None, _remembering),
        (torch.nn.Dropout, "forward", "self input", functools.partial(_dropout_forward, settings)),
        (torch.nn.LSTM, "forward", "self input hx", functools.partial(_lstm_forward, settings)),
        (torch.nn.Linear, "forward", "self input", _linear_forward),
        (torch, "addmm", None, _addmm),
        (torch.nn.utils.rnn, "pack_padded_sequence", "input lengths batch_first enforce_sorted", _packing),
    ]
    changes = []
    for owner, name, arguments, replacement in table:
        stock = _expected(owner, name, arguments)
        changes.append(Change(owner, name, stock, replacement(stock)))
    script = _expected(torch.jit, "script", "obj optimize _frames_up _rcb example_inputs")
    return [*changes, Change(torch.jit, "script", script, _script(script, changes))]


def _expected(owner: Any, name: str, arguments: str | None) -> Any:
    """``owner``'s own attribute ``name``, which takes these arguments (None: those of built-ins are not known)."""
    stock = vars(owner).get(name)
    told = f"{owner.__name__}.{name}"
    if not callable(stock):
        raise UsageError(f"this torch cannot be patched: it has no {told}")
    if arguments is not None:
        found = " ".join(inspect.signature(stock).parameters)
        if found != arguments:
            raise UsageError(f"this torch cannot be patched: {told} takes ({found}), not ({arguments})")
    return stock


def _remembering(stock: Any) -> Any:
    """``nn.RNNBase.__init__`` and ``__setstate__``: new, copied and unpickled LSTMs."""
    import torch

    @functools.wraps(stock)
    def remember(self: nn.RNNBase, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if isinstance(self, torch.nn.LSTM):
            _lstms.add(self)

    return remember


def _dropout_forward(settings: Settings, stock: Any) -> Any:
    import torch

    @functools.wraps(stock)
    def forward(self: nn.Dropout, input: Tensor) -> Any:
        # Case I is torch's own dropout.
        if not self.training or type(self) is not torch.nn.Dropout or not 0 < self.p < 1 or settings.case == "I":
            return stock(self, input)
        if type(input) is not torch.Tensor or input.dim() != 3 or not input.is_floating_point() or _is_captured():
            return stock(self, input)
        batch_first = _batch_first(settings, input.shape[-1])
        return stock(self, input) if batch_first is None else _drop(self, input, int(batch_first), settings)

    return forward


def _batch_first(settings: Settings, width: int) -> bool | None:
    """The layout of activations of this width; None if no LSTM has that width, or if they leave it open."""
    global _warned
    layouts = _lstms.layouts(width)
    if len(layouts) > 1 and settings.batch_first is None and not _warned:
        # The program may be done with some of them already.
        gc.collect()
        layouts = _lstms.layouts(width)
    if not layouts or settings.batch_first is not None:
        return settings.batch_first if layouts else None
    if len(layouts) == 1:
        return layouts.pop()
    if not _warned:
        _warned = True
        warnings.warn(
            f"sd-plugin: dropout of {width} units stays torch's own: LSTMs of that width differ in batch_first; "
            "enable('torch_nn', batch_first=…) says which it is",
            stacklevel=5,
        )
    return None


def _drop(module: nn.Dropout, input: Tensor, time_dim: int, settings: Settings) -> Tensor:
    from sd_plugin import functional, hints
    from sd_plugin.kernels import Steps

    steps, site = Steps(time_dim), f"dropout {input.shape[-1]}"
    dropped = functional.dropout(input, module.p, settings.case, steps, sampling=settings.sampling, site=site)
    if module.inplace:
        # The program may go on with its own reference to the input.
        dropped = hints.carry(dropped, steps, input.copy_(dropped), steps)
    hint = hints.lookup(dropped)
    if hint is not None:
        _probabilities[hint.kept] = module.p
    return dropped


def _lstm_forward(settings: Settings, stock: Any) -> Any:
    import torch

    @functools.wraps(stock)
    def forward(self: nn.LSTM, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        if not self.training or type(self) is not torch.nn.LSTM or self.proj_size or _is_captured():
            return stock(self, input, hx)
        options = _lstm_options(self, input, settings)
        if options is None:
            return stock(self, input, hx)
        from ._lstm import structured

        return structured(self, **options).forward(input, hx)

    return forward


def _lstm_options(lstm: nn.LSTM, input: Tensor | PackedSequence, settings: Settings) -> dict[str, Any] | None:
    """How this call drops units; None if it drops none and skips none, or in a way that only torch knows."""
    import torch

    data = input.data if isinstance(input, torch.nn.utils.rnn.PackedSequence) else input
    # With one layer there is no place for it.
    between = lstm.dropout if lstm.num_layers > 1 else 0.0
    if type(data) is not torch.Tensor or not 0 <= lstm.dropout < 1:
        return None
    hint = _lookup()(data)
    recurrent = _recurrent_dropout(between, hint, settings) if settings.recurrent else 0.0
    if hint is None and not between and not recurrent:
        return None
    return settings.lstm(recurrent, f"lstm {lstm.input_size}x{lstm.hidden_size}")


def _recurrent_dropout(between: float, hint: Hint | None, settings: Settings) -> float:
    if settings.recurrent_dropout is not None:
        return settings.recurrent_dropout
    return between or (0.0 if hint is None else _probabilities.get(hint.kept, 0.0))


def _linear_forward(stock: Any) -> Any:
    @functools.wraps(stock)
    def forward(self: nn.Linear, input: Tensor) -> Any:
        # In this order: most calls have no hint, and looking up a module's parameters takes its time.
        if _has_hint(input) and _are_ordinary(self.weight, self.bias):
            from sd_plugin import functional

            return functional.linear(input, self.weight, self.bias)
        return stock(self, input)

    return forward


def _addmm(stock: Any) -> Any:
    @functools.wraps(stock)
    def addmm(*args: Any, **kwargs: Any) -> Any:
        # Factors, other spellings and a bias that is not one of a linear layer are torch's.
        if len(args) == 3 and not kwargs and _has_hint(args[1]) and _are_ordinary(args[2], args[0]):
            bias, x, weight = args
            if x.dim() == 2 and bias.shape == weight.shape[1:]:
                from sd_plugin import functional

                return functional.linear(x, weight.t(), bias)
        return stock(*args, **kwargs)

    return addmm


def _has_hint(x: Any) -> bool:
    import torch

    return type(x) is torch.Tensor and not _is_compiling() and _lookup()(x) is not None


def _are_ordinary(weight: Any, bias: Any) -> bool:
    """They are such as this library's products take."""
    import torch

    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(weight) in kinds and weight.dim() == 2 and (bias is None or type(bias) in kinds)


def _packing(stock: Any) -> Any:
    @functools.wraps(stock)
    def pack_padded_sequence(
        input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
    ) -> PackedSequence:
        packed: PackedSequence = stock(input, lengths, batch_first, enforce_sorted)
        if _has_hint(input):
            from sd_plugin import hints
            from sd_plugin.kernels import Steps

            # Sorting moves rows within a time step, where all have the same kept units.
            rows = Steps.packed(packed.batch_sizes.tolist())
            source, carried = hints.lookup(input), hints.carry(input, Steps(int(batch_first)), packed.data, rows)
            target = hints.lookup(carried)
            if source is not None and target is not None and source.kept in _probabilities:
                _probabilities[target.kept] = _probabilities[source.kept]
        return packed

    return pack_padded_sequence


def _script(stock: Any, changes: list[Change]) -> Any:
    """``torch.jit.script``, which compiles source, and these functions are not written in its language."""

    @functools.wraps(stock)
    def script(obj: Any, optimize: Any = None, _frames_up: int = 0, *rest: Any, **named: Any) -> Any:
        with _stock_in_place(changes):
            return stock(obj, optimize, _frames_up + 1, *rest, **named)

    return script


@contextmanager
def _stock_in_place(changes: list[Change]) -> Iterator[None]:
    # Whatever is there now is put back, be it another patch's.
    present = [vars(change.owner)[change.name] for change in changes]
    try:
        for change in changes:
            setattr(change.owner, change.name, change.stock)
        yield
    finally:
        for change, value in zip(changes, present, strict=True):
            setattr(change.owner, change.name, value)


def _is_captured() -> bool:
    """torch records this call, to run something else in its place later."""
    import torch

    return _is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _is_compiling() -> bool:
    import torch

    # torch 2.2 has it there only.
    has_name = hasattr(torch.compiler, "is_compiling")
    return torch.compiler.is_compiling() if has_name else torch._utils.is_compiling()


@functools.cache
def _lookup() -> Callable[[Tensor], Hint | None]:
    """`hints.lookup`. Not imported when torch is patched, which may be because this library has just imported it."""
    from sd_plugin.hints import lookup

    return lookup
