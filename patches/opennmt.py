"""OpenNMT-py 3.5: registers the structured encoder and decoders, and replaces the stock ones on request.

What is hooked, and why, by module of the host:

| host | change |
|---|---|
| ``onmt.encoders``, ``onmt.decoders`` | new names ``sd_rnn``, ``sd_brnn``; on request also the stock names |
| ``onmt.opts.model_opts`` | the ``sd_*`` options, saved in checkpoints |
| ``onmt.utils.parse.ArgumentParser`` | checks of those options and of checkpoints; a missing file is named |
| ``onmt.model_builder.build_base_model`` | the generator uses hints |
| ``onmt.utils.loss.LossCompute.from_opts`` | the same cross entropy without holding the log-softmax |
| ``onmt.trainer.Trainer.train`` | the dropout of a resumed model; the report, at the end of the log |
| ``onmt.bin.*`` | a mistake of the user's is one line, not a traceback; models are checked before output is written |
| ``torch.serialization`` | ``argparse.Namespace`` may be loaded, or torch >= 2.6 refuses every checkpoint |
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from sd_plugin._environment import MODES, read_switch
from sd_plugin.errors import UsageError

from ._host import Finding, Host, find_distribution
from ._patcher import Patcher

VERSIONS = ("3.5.1",)
PROGRAMS = ("train", "translate", "build_vocab", "average_models", "release_model")

_patcher = Patcher()


def _unsupported(version: str) -> str | None:
    if version in VERSIONS:
        return None
    return f"OpenNMT-py {version} is not supported; supported: {', '.join(VERSIONS)}"


def _find(environ: Mapping[str, str]) -> list[Finding]:
    return find_distribution("OpenNMT-py", _unsupported)


HOST = Host(
    name="opennmt",
    title="OpenNMT-py",
    modules=("onmt", *(f"onmt.bin.{program}" for program in PROGRAMS)),
    supported=", ".join(VERSIONS),
    located="installed beside sd-plugin",
    find=_find,
    enabled=lambda: bool(_patcher),
)


class MissingDataFileError(UsageError, OSError):
    """A file that the configuration names is not there. Also an OSError, as the host's own."""


def on_import(module: ModuleType) -> None:
    """Patch the host, or one of its programs, right after its import; what to do is in the environment."""
    if module.__name__ == "onmt":
        switch = read_switch(os.environ)
        enable(replace=switch.replaces("opennmt"), mode=switch.mode)
    else:
        _tell_mistakes_in_one_line(module)


def enable(replace: bool = True, mode: str | None = None) -> None:
    """Add the structured encoder and decoders to OpenNMT-py.

    Args:
        replace: the host's own ``rnn``, ``brnn`` and ``ifrnn`` become structured too (LSTM only).
        mode: what a configuration without ``sd_mode`` gets; None for nr_rh_st.

    Raises:
        UsageError: the installed OpenNMT-py is not one this was tested with, or ``mode`` is unknown.
        ImportError: OpenNMT-py is not installed.
    """
    import onmt

    if mode is not None and mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    problem = _unsupported(getattr(onmt, "__version__", "unknown"))
    if problem is not None:
        raise UsageError(problem)
    from sd_plugin.opennmt import options

    disable()
    try:
        options.replacement.active, options.replacement.mode = replace, mode
        _allow_loading_options()
        _register(replace)
        _patch_options()
        _patch_model_builder()
        _patch_loss()
        _patch_trainer()
    except BaseException:
        # Never a half patch.
        disable()
        raise


def disable() -> None:
    """Put the host's classes and functions back.

    Models that are built already stay as they are, and so do the one-line messages of the host's programs and torch's
    permission to load the host's options.
    """
    _patcher.undo()
    options = sys.modules.get("sd_plugin.opennmt.options")
    if options is not None:
        options.replacement.active, options.replacement.mode = False, None


def _allow_loading_options() -> None:
    """The host stores its options as a Namespace; torch's weights-only loader must be told that this is fine."""
    import torch

    add_safe_globals = getattr(torch.serialization, "add_safe_globals", None)
    if add_safe_globals is not None:
        add_safe_globals([argparse.Namespace])


def _register(replace: bool) -> None:
    from onmt.decoders import str2dec
    from onmt.encoders import str2enc

    from sd_plugin.opennmt.decoder import StructuredRNNDecoder
    from sd_plugin.opennmt.encoder import StructuredRNNEncoder

    for name in ("sd_rnn", "sd_brnn", *(("rnn", "brnn") if replace else ())):
        _patcher.set_item(str2enc, name, StructuredRNNEncoder)
    for name in ("sd_rnn", *(("rnn", "ifrnn") if replace else ())):
        _patcher.set_item(str2dec, name, StructuredRNNDecoder)


class _Named:
    """Which options the user gave, in a file or on the command line, of every Namespace that a parser made.

    No attribute of the Namespace: the host saves that in its checkpoints.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[argparse.Namespace], frozenset[str]]] = {}

    def note(self, parser: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
        """Look through ``opt``, which ``parser`` has just made."""
        # Where nothing is given, a parser puts the default itself, the very object.
        names = frozenset(a.dest for a in parser._actions if getattr(opt, a.dest, a.default) is not a.default)
        key = id(opt)
        self._found[key] = (weakref.ref(opt, lambda _: self._found.pop(key, None)), names)

    def of(self, opt: argparse.Namespace) -> Collection[str]:
        """The names; all of them if no parser made ``opt``, but a program that gave every value itself."""
        made, names = self._found.get(id(opt), (lambda: None, frozenset[str]()))
        return names if made() is opt else frozenset(vars(opt))


def _patch_options() -> None:
    import onmt.opts
    from onmt.utils.parse import ArgumentParser

    from sd_plugin.opennmt import options

    def model_opts(parser: Any) -> None:
        stock["model_opts"](parser)
        options.add_options(parser)

    def parse_known_args(self: Any, *args: Any, **kwargs: Any) -> Any:
        known, unknown = stock["parse_known_args"](self, *args, **kwargs)
        options.check_unknown(unknown, strict=self in strict_parsers)
        named.note(self, known)
        return known, unknown

    def parse_args(self: Any, *args: Any, **kwargs: Any) -> Any:
        strict_parsers.add(self)
        return stock["parse_args"](self, *args, **kwargs)

    def validate_train_opts(cls: Any, opt: Any) -> None:
        stock["validate_train_opts"].__func__(cls, opt)
        _check_training(opt, named.of(opt))

    def validate_model_opts(cls: Any, opt: Any) -> None:
        stock["validate_model_opts"].__func__(cls, opt)
        if options.uses_plugin(opt):
            options.resolve(opt)

    def ckpt_model_opts(cls: Any, ckpt_opt: Any) -> Any:
        options.check_checkpoint(ckpt_opt)
        return stock["ckpt_model_opts"].__func__(cls, ckpt_opt)

    def validate_file(file_path: str, info: str) -> None:
        try:
            stock["_validate_file"].__func__(file_path, info)
        except OSError as error:
            raise MissingDataFileError(f"{info}: no such file: {file_path}") from error

    stock: dict[str, Any] = {"model_opts": onmt.opts.model_opts}
    stock["parse_known_args"] = ArgumentParser.parse_known_args
    stock["parse_args"] = ArgumentParser.parse_args
    # Parsers whose program ends on any key that it does not know.
    strict_parsers: weakref.WeakSet[Any] = weakref.WeakSet()
    named = _Named()
    for name in ("validate_train_opts", "validate_model_opts", "ckpt_model_opts", "_validate_file"):
        stock[name] = next(vars(cls)[name] for cls in ArgumentParser.__mro__ if name in vars(cls))
    _patcher.set(onmt.opts, "model_opts", model_opts)
    _patcher.set(ArgumentParser, "parse_known_args", parse_known_args)
    _patcher.set(ArgumentParser, "parse_args", parse_args)
    _patcher.set(ArgumentParser, "validate_train_opts", classmethod(validate_train_opts))
    _patcher.set(ArgumentParser, "validate_model_opts", classmethod(validate_model_opts))
    _patcher.set(ArgumentParser, "ckpt_model_opts", classmethod(ckpt_model_opts))
    _patcher.set(ArgumentParser, "_validate_file", staticmethod(validate_file))


def _checkpoint(path: str, what: str) -> dict[str, Any]:
    """What a checkpoint holds, looked up before the host reads or writes anything; the tensors stay on disk.

    Raises:
        UsageError: there is no such file, or the host could not load it.
    """
    from sd_plugin.opennmt import checkpoints

    if not os.path.exists(path):
        raise MissingDataFileError(f"{what}: no such file: {path}")
    try:
        return checkpoints.load(path, as_host=True)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error


def _stored_options(path: str, what: str) -> argparse.Namespace:
    """The options in a checkpoint.

    Raises:
        UsageError: as :func:`_checkpoint`, or it was written by a newer plugin.
    """
    from onmt.utils.parse import ArgumentParser

    loaded = _checkpoint(path, what)["opt"]
    try:
        # What an older version of the host did not know has its default, as the host itself gives it.
        stored: argparse.Namespace = ArgumentParser.ckpt_model_opts(loaded)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    return stored


def _check_training(opt: Any, named: Collection[str]) -> None:
    """Refuse or warn before anything is read or written; ``named`` are the options that the user gave."""
    from onmt.utils.logging import logger

    from sd_plugin.opennmt import options

    if opt.train_from:
        stored = _stored_options(opt.train_from, "train_from")
        warning = None if opt.override_opts else options.check_resumed(opt, stored)
        if warning:
            logger.warning(f"sd-plugin: {warning}")
        if options.is_structured(stored) and not opt.override_opts:
            options.continue_dropout(opt, stored, named)
    given = [name for name in options.OPTIONS if getattr(opt, name, None) is not None]
    if options.uses_plugin(opt):
        _check_backend(opt)
    elif given and not opt.train_from:
        logger.warning(
            f"sd-plugin: {', '.join(given)} without effect: encoder_type is {opt.encoder_type} and decoder_type "
            f"{opt.decoder_type}; use sd_rnn or sd_brnn, or set SD_PLUGIN=1"
        )


def _check_backend(opt: Any) -> None:
    import torch

    from sd_plugin import kernels

    try:
        kernels.choose("lstm", torch.device("cuda" if opt.gpu_ranks else "cpu"), torch.float32, counted=False)
    except kernels.BackendError as error:
        raise UsageError(str(error)) from None


def _patch_model_builder() -> None:
    import onmt.model_builder
    import onmt.modules

    from sd_plugin.linear import StructuredLinear
    from sd_plugin.opennmt.decoder import StructuredInputFeedRNNDecoder, StructuredStdRNNDecoder

    stock = onmt.model_builder.build_base_model

    @functools.wraps(stock)
    def build_base_model(*args: Any, **kwargs: Any) -> Any:
        model = stock(*args, **kwargs)
        if isinstance(model.decoder, (StructuredInputFeedRNNDecoder, StructuredStdRNNDecoder)):
            generator = model.generator
            copies = isinstance(generator, onmt.modules.CopyGenerator)
            for linear in (generator.linear, generator.linear_copy) if copies else (generator,):
                StructuredLinear.adopt(linear)
        return model

    _patcher.set(onmt.model_builder, "build_base_model", build_base_model)


def _patch_loss() -> None:
    from onmt.utils.loss import LossCompute

    from sd_plugin.loss import FusedCrossEntropyLoss
    from sd_plugin.opennmt.decoder import StructuredInputFeedRNNDecoder, StructuredStdRNNDecoder

    stock: Any = vars(LossCompute)["from_opts"]

    def from_opts(cls: Any, opt: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        compute = stock.__func__(cls, opt, model, *args, **kwargs)
        if isinstance(model.decoder, (StructuredInputFeedRNNDecoder, StructuredStdRNNDecoder)):
            FusedCrossEntropyLoss.adopt(compute.criterion)
        return compute

    _patcher.set(LossCompute, "from_opts", classmethod(from_opts))


def _patch_trainer() -> None:
    from onmt.trainer import Trainer
    from onmt.utils.logging import logger

    from sd_plugin import stats

    stock = Trainer.train

    @functools.wraps(stock)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        _catch_up_dropout(self)
        result = stock(self, *args, **kwargs)
        if stats.sites():
            logger.info(stats.report())
        return result

    _patcher.set(Trainer, "train", train)


def _catch_up_dropout(trainer: Any) -> None:
    """Give a resumed model the dropout of its run.

    The host builds it with the checkpoint's first value and changes that at the very step a change is due, no later.
    Its own modules are left alone: not all of them can be told.
    """
    from onmt.utils.logging import logger

    from sd_plugin.opennmt import StructuredInputFeedRNNDecoder, StructuredRNNEncoder, StructuredStdRNNDecoder

    ours = (StructuredRNNEncoder, StructuredInputFeedRNNDecoder, StructuredStdRNNDecoder)
    model, step = trainer.model, trainer.optim.training_step
    both = {name: getattr(model, name, None) for name in ("encoder", "decoder")}
    parts: dict[str, Any] = {name: part for name, part in both.items() if isinstance(part, ours)}
    due = [p for p, start in zip(trainer.dropout, trainer.dropout_steps) if start < step]  # noqa: B905
    changed = {name: part for name, part in parts.items() if due and part.current_dropout != due[-1]}
    if changed:
        where = "" if len(changed) == len(both) else f" of the {' and '.join(changed)}"
        before = next(iter(changed.values())).current_dropout
        why = f"by its schedule at step {step}" if len(trainer.dropout_steps) > 1 else "from the configuration"
        for part in changed.values():
            part.update_dropout(due[-1])
        if trainer.gpu_rank <= 0:
            logger.info(f"sd-plugin: dropout{where} {before:g} → {due[-1]:g}, {why}")
    if parts and trainer.model_saver is not None:
        # The next checkpoint names what this run drops: who continues it goes on with that.
        saved = trainer.model_saver.model_opt
        saved.dropout, saved.dropout_steps = list(trainer.dropout), list(trainer.dropout_steps)
        saved.attention_dropout = list(trainer.attention_dropout)


def _check_models_first(program: ModuleType) -> None:
    """Let onmt_translate look at its models before it empties the output file of a former translation."""
    stock = program.translate

    @functools.wraps(stock)
    def translate(opt: Any) -> Any:
        for path in opt.models:
            _stored_options(path, "model")
        return stock(opt)

    program.translate = translate  # type: ignore[attr-defined]


class _CheckedTorch:
    """torch for a program that loads checkpoints by itself: looks at each of them first."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """``torch.load``; UsageError if it is no checkpoint that can be loaded."""
        import torch

        _checkpoint(path, "model")
        return torch.load(path, *args, **kwargs)


def _tell_mistakes_in_one_line(program: ModuleType) -> None:
    """Let a console script end with one line and exit code 2 where this plugin refuses the user's input."""
    stock: Callable[[], Any] = program.main
    if getattr(stock, "_sd_plugin", False):
        return
    if program.__name__ == "onmt.bin.translate":
        _check_models_first(program)
    elif program.__name__ in ("onmt.bin.average_models", "onmt.bin.release_model"):
        program.torch = _CheckedTorch()  # type: ignore[attr-defined]

    @functools.wraps(stock)
    def main() -> Any:
        try:
            return stock()
        except UsageError as error:
            print(f"sd-plugin: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    main._sd_plugin = True  # type: ignore[attr-defined]
    program.main = main  # type: ignore[attr-defined]
