"""What a patch module declares about its host: one entry of the registry that `sd_plugin.patches` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from sd_plugin.errors import UsageError


@dataclass(frozen=True)
class Finding:
    """A host that was found on this machine.

    Attributes:
        where: its folder, or how it got here.
        version: as it tells it itself, or a commit.
        problem: why it is not patched; None when it can be.
    """

    where: str
    version: str
    problem: str | None = None


@dataclass(frozen=True)
class Host:
    """A program, or a library, that structured dropout can be patched into.

    Attributes:
        name: what `sd_plugin.enable` and (but for torch) ``SD_PLUGIN_TARGETS`` call it: its patch module's name.
        title: the host's own name.
        modules: its modules that the start-up hook reports to the patch.
        supported: the versions this was made for, in words.
        located: how to show the plugin where it is, in words.
        find: looks for it with these environment variables, importing nothing of it.
        enabled: it is patched in this process.
        refuses: why a mode, case and recurrent dropout from the environment are not for it; None if they are.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    supported: str
    located: str
    find: Callable[[Mapping[str, str]], list[Finding]]
    enabled: Callable[[], bool]
    refuses: Callable[[str, str | None, float | None], str | None] = lambda mode, case, recurrent_dropout: None

    @property
    def target(self) -> str:
        """Its name in ``SD_PLUGIN_TARGETS``."""
        return "torch" if self.name == "torch_nn" else self.name


def refusal(check: Callable[..., object], *arguments: object) -> str | None:
    """The text of the UsageError that ``check`` raises for these arguments; None if it raises none."""
    try:
        check(*arguments)
    except UsageError as error:
        return str(error)
    return None


def find_distribution(name: str, problem: Callable[[str], str | None]) -> list[Finding]:
    """An installed distribution as findings, none or one; ``problem`` judges its version."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    version = found.version
    return [Finding(str(found.locate_file("")), version, problem(version))]
