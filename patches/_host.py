"""What a patch module declares about its host: one entry of the registry that `sd_plugin.patches` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata


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
    """

    name: str
    title: str
    modules: tuple[str, ...]
    supported: str
    located: str
    find: Callable[[Mapping[str, str]], list[Finding]]
    enabled: Callable[[], bool]

    @property
    def target(self) -> str:
        """Its name in ``SD_PLUGIN_TARGETS``."""
        return "torch" if self.name == "torch_nn" else self.name


def find_distribution(name: str, problem: Callable[[str], str | None]) -> list[Finding]:
    """An installed distribution as findings, none or one; ``problem`` judges its version."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    version = found.version
    return [Finding(str(found.locate_file("")), version, problem(version))]
