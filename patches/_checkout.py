"""Hosts that are not installed but checked out: where they lie, whether they are what they should be, and getting one.

A checkout is looked for in the folder that an environment variable names, in the working directory and in the cache
folder; :meth:`Checkout.obtain` clones the pinned commit into the latter. One in the cache folder is used only if nobody
else can have changed anything in it.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd_plugin.errors import UsageError

from ._fingerprint import Fingerprint, difference
from ._host import Finding

#: How the folders begin that a host is cloned into before it gets its name.
_SCRATCH = ".cloning-"


@dataclass(frozen=True)
class Checkout:
    """A host's repository.

    Attributes:
        name: of its folder; origin: where it is cloned from; commit: the one this was tested with.
        variable: the environment variable that may name its folder.
        fingerprints: what is expected of its files, by path.
        needed: further files that it must have.
    """

    name: str
    origin: str
    commit: str
    variable: str
    fingerprints: Mapping[str, Fingerprint]
    needed: tuple[str, ...] = ()

    def problem(self, folder: Path) -> str | None:
        """Why ``folder`` is not a checkout that can be used, in one line; None if it is."""
        if not folder.is_dir():
            return f"{folder} is not a folder"
        for name in (*self.fingerprints, *self.needed):
            if not (folder / name).is_file():
                return f"{folder} is not a checkout of {self.name}: it has no {name}"
        for name, fingerprint in self.fingerprints.items():
            try:
                text = (folder / name).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                return f"{folder / name} cannot be read ({error.__class__.__name__})"
            found = difference(text, fingerprint)
            if found is not None:
                return f"{folder / name} is not that of {self.name}: {found}"
        return None

    def candidates(self, environ: Mapping[str, str]) -> list[Path]:
        """Folders that may be checkouts, best first: the variable's, the working directory, the cache folder's."""
        named = environ.get(self.variable, "").strip()
        first = next(iter(self.fingerprints))
        here = [Path.cwd()] if (Path.cwd() / first).is_file() else []
        return [*([Path(named).expanduser()] if named else []), *here, *self.cached()]

    def cached(self) -> list[Path]:
        """The clones that :meth:`obtain` made and nobody else can have changed."""
        from sd_plugin.kernels import cache_folder

        return cache_folder.existing("hosts", self.name)

    def find(self, environ: Mapping[str, str]) -> list[Finding]:
        """Every candidate with what is wrong with it."""
        return [Finding(str(path), commit_of(path), self.problem(path)) for path in self.candidates(environ)]

    def locate(self, folder: Path | None, environ: Mapping[str, str]) -> Path:
        """The checkout to use: ``folder`` if given, else the first candidate, else a fresh clone.

        Raises:
            UsageError: what was named is not the host, or it cannot be cloned; the text says what to do.
        """
        chosen = [folder] if folder is not None else self.candidates(environ)
        if not chosen:
            return self.obtain()
        problem = self.problem(chosen[0])
        if problem is not None:
            raise UsageError(problem)
        return chosen[0].resolve()

    def obtain(self) -> Path:
        """Clone the pinned commit into the cache folder, complete or not at all.

        Raises:
            UsageError: it could not be cloned.
        """
        from sd_plugin.kernels import cache_folder, leftovers

        try:
            target = cache_folder.made("hosts") / self.name
            if os.path.lexists(target) and target not in self.cached():
                raise UsageError(
                    f"{target} is in the way: others may have changed it, or it is a link; remove it, "
                    f"or name a checkout of {self.name} with {self.variable}"
                )
            leftovers.remove(target.parent, f"{_SCRATCH}*")
            prefix = f"{_SCRATCH}{leftovers.tag()}-"
            with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
                self._clone(Path(scratch) / self.name, target)
        except OSError as error:
            raise self._not_obtained(f"{error.strerror}: {error.filename}" if error.filename else str(error)) from error
        return target

    def _clone(self, clone: Path, target: Path) -> None:
        self._git("clone", "--quiet", self.origin, str(clone))
        self._git("-C", str(clone), "checkout", "--quiet", self.commit)
        problem = self.problem(clone)
        if problem is not None:
            raise UsageError(f"{self.origin} at {self.commit[:10]}: {problem}")
        try:
            clone.rename(target)
        except OSError:
            # Another process was faster, or else there is a reason to tell.
            if self.problem(target) is not None:
                raise

    def _git(self, *arguments: str) -> None:
        try:
            done = subprocess.run(
                ["git", *arguments],
                capture_output=True,
                text=True,
                timeout=600,
                # Nobody else may write what is run later.
                umask=0o077,
                # A server that asks for a password must not hang the program.
                env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
                check=False,
            )
            reason = (done.stderr.strip().splitlines() or ["git failed"])[-1] if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"{error.__class__.__name__}: {error}"
        if reason is not None:
            raise self._not_obtained(reason)

    def _not_obtained(self, reason: str) -> UsageError:
        return UsageError(
            f"no checkout of {self.name} was found, and cloning {self.origin} failed ({reason}); "
            f"get commit {self.commit[:10]} from there and name its folder with {self.variable}"
        )


def commit_of(folder: Path) -> str:
    """The commit that is checked out in ``folder``, ten digits; ``unknown`` if git does not say."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    top = (folder / ".git").exists()
    return done.stdout.strip() if done.returncode == 0 and top else "unknown"
