"""The start-up hook: tells a patch when a host module has been imported.

`sd_plugin.pth` (`sd_plugin.start` from Python 3.15 on) calls `install` in every interpreter of the
environment, so this module has two duties above all: cost nothing worth noticing (no import beyond what an
interpreter has loaded anyway) and never do harm (an import of a host succeeds whatever happens in here).

A patch module named in `HOOKS` declares `on_import(module)`. It is called in the importing thread, right
after the module's own code has run and before the `import` statement returns, and again after every
`importlib.reload`; it must therefore be idempotent. It is also called for a module that had been imported
before `install` ran. It is not called for a module run as a program (`python -m onmt.bin.train` imports
`onmt`, but runs `onmt.bin.train` under the name `__main__`), so a patch must not rely on the `onmt.bin`
modules alone. An exception in it becomes one line on stderr.
"""

import os
import sys
from _thread import RLock, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# Host module -> the patch module to tell. Parents stand before their children: `install` keeps this order.
# The patch modules declare the same (`HOST.modules`), but may not be imported to be asked.
HOOKS: "dict[str, str]" = {
    # A checkout's modules have the most ordinary names; the patch makes sure of whose they are.
    "data": "sd_plugin.patches.awd_lstm",
    "embed_regularize": "sd_plugin.patches.awd_lstm",
    "locked_dropout": "sd_plugin.patches.awd_lstm",
    "weight_drop": "sd_plugin.patches.awd_lstm",
    "model": "sd_plugin.patches.awd_lstm",
    "splitcross": "sd_plugin.patches.awd_lstm",
    "fastai.text.models.core": "sd_plugin.patches.fastai",
    "src.models.tagger_birnn_cnn_crf": "sd_plugin.patches.targer",
    "torch": "sd_plugin.patches.torch_nn",
    "onmt": "sd_plugin.patches.opennmt",
    "onmt.bin.train": "sd_plugin.patches.opennmt",
    "onmt.bin.translate": "sd_plugin.patches.opennmt",
    "onmt.bin.build_vocab": "sd_plugin.patches.opennmt",
    "onmt.bin.average_models": "sd_plugin.patches.opennmt",
    "onmt.bin.release_model": "sd_plugin.patches.opennmt",
}
# The patches that add something even when nothing is to be replaced. The others are told of nothing then.
ADDITIVE = ("sd_plugin.patches.opennmt",)


class HostFinder:
    """A `sys.meta_path` finder that finds host modules through the other finders, and wraps their loaders."""

    def __init__(self) -> None:
        # (thread, module) of the searches under way. Another finder of this kind may restart the search from
        # the top, and must then get past this one, or each would wrap the other's loader twice.
        self._searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Finds `fullname` if it is a host module, with a loader that tells its patch; else returns None."""
        patch = _active.get(fullname)
        search = (get_ident(), fullname)
        if patch is None or search in self._searching:
            return None
        self._searching.add(search)
        try:
            spec = self._find_elsewhere(fullname, path, target)
        finally:
            self._searching.discard(search)
        # A namespace package has no loader: a stray folder that happens to be called as the host is.
        if spec is None or spec.loader is None or isinstance(spec.loader, _TellingLoader):
            return spec
        if hasattr(spec.loader, "exec_module"):
            spec.loader = _TellingLoader(spec.loader, patch)  # type: ignore[assignment]
        else:
            _warn(f"{fullname} not patched: its loader {spec.loader!r} has no exec_module")
        return spec

    def _find_elsewhere(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in tuple(sys.meta_path):
            # The finders of Python 3.11 and earlier may lack find_spec; the import system asks those itself.
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _TellingLoader:
    """Stands in for a host module's loader until the module is executed, then tells the patch.

    Everything but `exec_module` is the real loader's, for those who do not import the module but look at it
    or run its code as a program (`importlib.util.find_spec`, `runpy`, `pkgutil`). An imported module gets the
    real loader back before its code runs, so that neither it nor `inspect`, `importlib.resources` or a pickle
    ever sees this class.
    """

    def __init__(self, loader: "Any", patch: str) -> None:
        self._loader = loader
        self._patch = patch

    def __getattr__(self, name: str) -> "Any":
        if name in ("_loader", "_patch"):  # absent only while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        spec = getattr(module, "__spec__", None)
        name = spec.name if spec is not None else module.__name__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        _told.add(name)
        self._loader.exec_module(module)
        # A module may replace itself in sys.modules while it runs; what importers get is what counts.
        _tell(self._patch, name, sys.modules.get(name, module))


_finder = HostFinder()
# The part of HOOKS that the environment asks for.
_active: "dict[str, str]" = {}
_lock = RLock()
# The host modules whose import a telling loader has taken in hand, so that `install` leaves them alone.
_told: "set[str]" = set()
_warned: "set[tuple[str, str]]" = set()


def install() -> None:
    """Installs the hook, unless `SD_PLUGIN` switches the plugin off.

    Host modules that are imported already are handled at once. Calling it again adds what the environment asks
    for by now. It raises nothing on account of the environment: a value of `SD_PLUGIN` that it does not understand
    is one line on stderr.
    """
    hooks = _hooks_asked_for()
    if not hooks:
        return
    with _lock:
        added = {name: patch for name, patch in hooks.items() if name not in _active}
        _active.update(added)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    for name, patch in added.items():
        module = sys.modules.get(name)
        if module is None or name in _told:
            continue
        _told.add(name)
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            _warn(f"{name} not patched: it was being imported when the start-up hook was installed")
        else:
            _tell(patch, name, module)


def _hooks_asked_for() -> "dict[str, str]":
    """The part of `HOOKS` that concerns this process, by its environment."""
    targets: tuple[str, ...] = ()
    # Most interpreters run without the variable: they are spared loading the module that reads it.
    if os.environ.get("SD_PLUGIN"):
        from sd_plugin._environment import read_switch

        switch = read_switch(os.environ)
        if switch.problem is not None:
            _warn(switch.problem)
        if not switch.enabled:
            return {}
        targets = switch.targets if switch.replace else ()
    asked = {*ADDITIVE, *(_patch_of(target) for target in targets)}
    return {name: patch for name, patch in HOOKS.items() if patch in asked}


def _patch_of(target: str) -> str:
    """The patch module of a host that `SD_PLUGIN_TARGETS` names."""
    return f"sd_plugin.patches.{'torch_nn' if target == 'torch' else target}"


def is_installed() -> bool:
    """The hook watches the imports of this process."""
    return _finder in sys.meta_path


def uninstall() -> None:
    """Removes the hook and forgets what it has seen. What patches have done stays done."""
    with _lock:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        _active.clear()
        _told.clear()
        _warned.clear()


def _tell(patch: str, name: str, module: "ModuleType") -> None:
    """Calls the patch's `on_import`; whatever goes wrong, the host's import goes on."""
    try:
        from importlib import import_module

        import_module(patch).on_import(module)
    except BaseException as error:
        # Ctrl-C, or what a time limit or an event loop throws at the program, strikes in here by chance.
        if not isinstance(error, (Exception, SystemExit)) and not _is_own(error):
            raise
        # One broken patch would otherwise be reported for each of its host's modules.
        _warn(f"{name} not patched: {_describe(error)}", key=(patch, _describe(error)))


def _is_own(error: BaseException) -> bool:
    """A `raise` statement of this package made it; nothing from outside struck while its code was running."""
    from opcode import opname

    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    frame = traceback.tb_frame
    own = frame.f_globals.get("__name__", "").partition(".")[0] == "sd_plugin"
    return own and opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def _describe(error: BaseException) -> str:
    """The error in one line, with the place it was raised at: there is no traceback to find that in."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # an exception may fail to tell what it is, which must not fail the host's import
        text = type(error).__name__
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    place = "" if traceback is None else f" ({traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno})"
    return " ".join(text.split()) + place


def _warn(text: str, key: "tuple[str, str] | None" = None) -> None:
    """Prints one line on stderr, once per process for each text (or `key`)."""
    key = key or ("", text)
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    try:
        # The stream of a windowed or daemonized process may be None, closed or full.
        if sys.stderr is not None:
            print(f"sd-plugin: {text}", file=sys.stderr)
    except (OSError, ValueError):
        pass
