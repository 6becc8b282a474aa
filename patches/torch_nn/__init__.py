"""Any program built from `nn.LSTM`, `nn.Dropout` and `nn.Linear`: structured dropout without a change to it.

| torch | in training |
|---|---|
| ``nn.Dropout`` | activations of an LSTM's width are dropped by the chosen case, with a hint for what follows |
| ``nn.LSTM`` | uses that hint; its ``dropout`` likewise; ``nr_rh_st`` drops units of :math:`h_{t-1}` too |
| ``nn.Linear``, ``torch.addmm`` | use the hint of their input; ``addmm`` is what projections written by hand call |
| ``nn.utils.rnn.pack_padded_sequence`` | carries the hint over |
| ``nn.utils.rnn.PackedSequence`` | tells which rows of its data belong to which time step |
| ``nn.RNNBase``, ``nn.RNNCellBase`` | tell which LSTMs there are, and what else, for the report |
| ``torch.jit.script`` | compiles torch's own code |

In mode ``random``, and in eval mode, torch is left as it is.

Recurrent dropout in ``nr_rh_st``, unless ``recurrent_dropout`` says otherwise, has the probability of the dropout
around the LSTM, as in the paper: its own ``dropout`` if it has several layers, else that of the `nn.Dropout` which its
input comes from.

The time dimension of a 3-D activation is that of the living LSTMs which take or give its width. Where these differ in
``batch_first``, the option of that name decides, or the dropout stays torch's, with a warning. A 2-D activation has
time steps if it is the very tensor that a `PackedSequence` holds as its data.

A subclass of `nn.LSTM` counts if a ``forward`` of its own, which comes to call torch's, is all that it has changed; one
of `nn.Dropout` if it has not changed that either (see `_classes`). Functions that modules have imported by name are
replaced there, and put back by `disable`, as far as they are globals of a loaded module.

What stays torch's: `F.dropout`, other subclasses (parametrized LSTMs among them), activations of other dimensions or of
no LSTM's width, subclasses of `torch.Tensor`, and what is recorded to be run in another way (see `_capture`): under
`torch.compile`, which includes what it runs between its graphs, ``trace``, ``script``, `torch.export`, `torch.func`
and dispatch modes. Products written as ``F.linear``, ``@`` or ``matmul`` are dense, and the hint counted as lost;
`F.linear` is not replaced because tensor subclasses and quantization know it by identity. Each call that is left to
torch is counted by its reason, for the report.

What has an LSTM's width is taken for one's activation, be it a transformer's. No double backward.

Nothing is stored in modules or tensors but hints, so that a model pickled whole loads without this package.

Source: Sarma et al. 2021 (arXiv 2106.12089), section 3; Zaremba et al. 2014 (arXiv 1409.2329).
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Mapping
from types import ModuleType

from sd_plugin import _report
from sd_plugin._environment import read_case, read_recurrent_dropout, read_switch
from sd_plugin._tested import TORCH, release
from sd_plugin.errors import UsageError

from .. import _names
from .._host import Finding, Host, find_distribution, refusal
from .._patcher import Patcher
from ._settings import checked

OLDEST = (2, 2)
#: What the report cannot count.
UNSEEN = "F.dropout, and dropouts and LSTMs that the program has written itself"

_patcher = Patcher()
#: What modules may have imported by name: torch's function, and what took its place.
_by_name: list[tuple[object, object]] = []


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
        else refusal(checked, mode, case, "exact", recurrent_dropout, None)
    ),
)


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
    settings = checked(mode, case, sampling, recurrent_dropout, batch_first)
    disable()
    if settings is None:
        return
    import torch

    problem = _unsupported(torch.__version__)
    if problem is not None:
        raise UsageError(problem)
    from . import _living, _modules
    from ._changes import changes

    replaced = changes(settings)
    _modules.warned.clear()
    _living.lstms.find()
    try:
        for change in replaced:
            _patcher.set(change.owner, change.name, change.replacement)
        _by_name.extend((change.stock, change.replacement) for change in replaced if change.may_be_imported)
        _names.rebind(_by_name)
    except BaseException:
        # Never a half patch.
        disable()
        raise
    _report.unseen.add(UNSEEN)
    _tell_at_exit()


def disable() -> None:
    """Give torch its own behaviour back."""
    _patcher.undo()
    if _by_name:
        from . import _living, _packed

        # Those who came later have taken the replacement.
        _names.rebind((replacement, stock) for stock, replacement in _by_name)
        _by_name.clear()
        _living.lstms.forget()
        _packed.rows.forget()
        _report.unseen.discard(UNSEEN)


@functools.cache
def _tell_at_exit() -> None:
    atexit.register(_at_exit)


def _at_exit() -> None:
    """That nothing was dropped, and why: where something was, the counters have seen to it themselves."""
    if _report.is_asked_for():
        from sd_plugin import stats

        stats.tell_at_exit()
