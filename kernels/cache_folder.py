"""The user's cache folder: where it is, making it, and making sure that nobody else can put anything into it.

Native code and checkouts of programs are run from there. So the folder, its own sub-folders and every folder above it
must belong to this user or to root, and nobody else may write to them; above it, a folder in which everyone may make
files but nobody may replace another's (the sticky bit, as ``/tmp`` has) is good enough. What fails this is not used:
one line on standard error says what to do, and a private folder among the temporary files takes its place.

Symbolic links are followed above the cache folder (``/home`` may be one), and the owner of each link and all that it
leads through are checked alike. The cache folder, its sub-folders and the files that are loaded may be none.

A group counts as others unless it is its owner's alone: where every user has a group of the user's own name, as on
Debian and Fedora, the umask is often 002, and ``~/.cache`` is writable for that group.

Environment variables: ``SD_PLUGIN_CACHE`` names the folder, otherwise it is ``$XDG_CACHE_HOME/sd-plugin`` or
``~/.cache/sd-plugin``.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

VARIABLE = "SD_PLUGIN_CACHE"
_REMEDY = f"set {VARIABLE} to a folder that only you can write to"
_ROOT = 0
#: As many links as Linux follows.
_MOST_LINKS = 40
_OPEN_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, a pipe in place of a file would be waited for.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class UnsafeError(PermissionError):
    """Somebody else could change a folder or a file; the text names it and says in one line what to do."""


class NamedError(OSError):
    """The folder that the environment variable names cannot be one; the text says in one line what to do."""


# Where it is.


def chosen(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the environment says that the cache folder is; None for a user without a home."""
    base = environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is invalid by its specification.
    usual = os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "sd-plugin")
    path = os.path.expanduser(environ.get(VARIABLE, "").strip() or usual)
    # Without a home directory the tilde stays.
    return None if path.startswith("~") else Path(os.path.abspath(path))


def candidates() -> list[Path]:
    """Where the cache folder may be, by preference: the one chosen, then one among the temporary files."""
    place, named = chosen(), os.environ.get(VARIABLE, "").strip()
    places = [] if place is None else [place]
    if place is None and named:
        _tell(f"{VARIABLE}={named}: there is no such home; {_REMEDY}")
    # There may be no directory for temporary files either.
    with suppress(OSError):
        places.append(Path(os.path.abspath(tempfile.gettempdir()), f"sd-plugin-{os.geteuid()}"))
    return places


# Using it.


def made(*names: str) -> Path:
    """The sub-folder ``names`` of the first candidate that is safe and can be written, made if it is missing.

    Raises:
        OSError: there is none; the text says what to do.
    """
    reason = "there is no home and no temporary directory"
    for place in candidates():
        path = place.joinpath(*names)
        try:
            with opened(place, *names, make=True) as folder:
                if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder, effective_ids=True):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            warn(error)
            reason = " ".join(str(error).split())
            continue
        return path
    raise OSError(f"there is no cache folder ({reason}); {_REMEDY}")


def existing(*names: str) -> list[Path]:
    """The sub-folders ``names`` of the candidates that are there, and safe with everything in them. Makes nothing."""
    found = []
    for place in candidates():
        path = place.joinpath(*names)
        try:
            with opened(place, *names):
                _check_contents(path)
        except OSError as error:
            warn(error)
            continue
        found.append(path)
    return found


def problem(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the folder that the environment chooses cannot be used, in one line; None if it can, or can be made."""
    place, named = chosen(environ), environ.get(VARIABLE, "").strip()
    if place is None:
        return f"{VARIABLE}={named}: there is no such home" if named else None
    try:
        with opened(place):
            return None
    except FileNotFoundError:
        above = next(path for path in (place, *place.parents) if path.exists())
        if named and not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
            return f"{place} cannot be made: {above} cannot be written"
    except OSError as error:
        return " ".join(str(error).split())
    return None


@contextmanager
def opened(folder: Path, *names: str, make: bool = False) -> Iterator[int]:
    """A descriptor of the cache folder ``folder``, or its sub-folder ``names``, once all of it is seen to be safe.

    What is opened by this descriptor lies in the folder that was checked, whatever becomes of its path.

    Args:
        folder: absolute.
        make: make it, private, with what is missing above it.

    Raises:
        UnsafeError: somebody else can write there. NamedError: ``SD_PLUGIN_CACHE`` names what cannot be a folder.
        OSError: it is not there, or cannot be made.
    """
    try:
        descriptor = _walk(folder, names, make)
    except OSError as error:
        told = _fault_of_named(error, folder)
        if told is None:
            raise
        raise NamedError(told) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(folder: int, path: Path) -> int:
    """A descriptor of the file ``path``, in the folder with the descriptor ``folder``, once it is seen to be safe.

    Raises:
        UnsafeError: somebody else can write it. OSError: it is not there, is a link or cannot be read.
    """
    file = os.open(path.name, _OPEN_FILE, dir_fd=folder)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise UnsafeError(f"{path} is no file; remove it")
        _check(found, path, f"/proc/self/fd/{file}")
    except BaseException:
        os.close(file)
        raise
    return file


def warn(error: OSError) -> None:
    """Says on standard error what is not used because it is unsafe or no folder; other errors are the caller's."""
    if isinstance(error, (UnsafeError, NamedError)):
        _tell(str(error))


@cache
def _tell(text: str) -> None:
    """Once per process for each text."""
    # The stream of a daemon may be None, closed or full.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"sd-plugin: the cache is not used as it is: {text}", file=sys.stderr, flush=True)


# Going there: name by name from the root, so that each folder is known to be safe before a name is looked up in it.


def _walk(folder: Path, names: tuple[str, ...], make: bool) -> int:
    here, path, links = os.open("/", _OPEN_FOLDER), Path("/"), 0
    try:
        _check(os.fstat(here), path, "/", above=True)
        above = _reversed_parts(folder.parent)
        while above:
            name = above.pop()
            target = _link(here, name, path)
            if target is None:
                here, path = _enter(here, name, path, make, above=True)
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path / name))
            if os.path.isabs(target):
                os.close(here)
                here, path = os.open("/", _OPEN_FOLDER), Path("/")
            above += _reversed_parts(Path(target))
        for name in filter(None, (folder.name, *names)):
            if _link(here, name, path) is not None:
                raise UnsafeError(f"{path / name} is a symbolic link; put a folder there, or set {VARIABLE} to one")
            here, path = _enter(here, name, path, make, above=False)
    except BaseException:
        os.close(here)
        raise
    return here


def _reversed_parts(path: Path) -> list[str]:
    return [name for name in reversed(path.parts) if name != path.root]


def _link(here: int, name: str, path: Path) -> str | None:
    """Where the link ``name`` leads; None if it is not one, or nothing.

    Raises:
        UnsafeError: its owner could change where it leads. OSError: there is no way to look.
    """
    try:
        found = os.stat(name, dir_fd=here, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode):
            return None
        target = os.readlink(name, dir_fd=here)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _located(error, path / name) from error
    _check_owner(found.st_uid, path / name, above=True)
    return target


def _enter(here: int, name: str, path: Path, make: bool, above: bool) -> tuple[int, Path]:
    """The folder ``name`` in ``here``, whose descriptor is closed then, and its path."""
    below_path = path.parent if name == ".." else path / name
    try:
        try:
            below = os.open(name, _OPEN_FOLDER, dir_fd=here)
        except FileNotFoundError:
            if not make:
                raise
            # Another process may be faster.
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=here)
            below = os.open(name, _OPEN_FOLDER, dir_fd=here)
    except OSError as error:
        raise _located(error, below_path) from error
    try:
        _check(os.fstat(below), below_path, f"/proc/self/fd/{below}", above)
    except BaseException:
        os.close(below)
        raise
    os.close(here)
    return below, below_path


def _fault_of_named(error: OSError, folder: Path) -> str | None:
    """Why ``folder``, which the variable names, cannot be one; None if it does not, or if that is no fault.

    A folder that is not there is none, nor is one that is there and cannot be written in: an image may hold such a one.
    """
    named = os.environ.get(VARIABLE, "").strip()
    if not named or folder != chosen() or isinstance(error, (UnsafeError, FileNotFoundError)):
        return None
    path = Path(error.filename or folder)
    if error.errno == errno.ENOTDIR:
        return f"{path} is not a folder; {_REMEDY}"
    # Else it is below, in a folder that may be read.
    return f"{path}: {error.strerror}; {_REMEDY}" if folder.is_relative_to(path) else None


def _located(error: OSError, path: Path) -> OSError:
    """The same error, of the whole path instead of the last name."""
    return OSError(error.errno, error.strerror, str(path))


# Who may write.


def _check_contents(folder: Path) -> None:
    """Raises UnsafeError if somebody else could change anything in ``folder``, at any depth."""

    def fail(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            path = Path(where, name)
            found = path.lstat()
            try:
                if stat.S_ISLNK(found.st_mode):
                    _check_owner(found.st_uid, path)
                else:
                    _check(found, path, str(path))
            except UnsafeError as error:
                raise UnsafeError(f"others may have changed {path}; remove {folder}, which is made anew") from error


def _check(found: os.stat_result, path: Path, opened_at: str, above: bool = False) -> None:
    """Raises UnsafeError if somebody else may write a folder or file, which ``opened_at`` leads to too.

    Args:
        above: it is a folder above the cache folder.
    """
    _check_owner(found.st_uid, path, above)
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not others or (above and found.st_mode & stat.S_ISVTX):
        return
    if others == stat.S_IWGRP and _is_owners_own(found.st_gid, found.st_uid) and not _has_list(opened_at):
        return
    remedy = f"chmod go-w {shlex.quote(str(path))}"
    raise UnsafeError(f"others can write to {path}; {remedy}, or {_REMEDY}")


def _check_owner(owner: int, path: Path, above: bool = False) -> None:
    if owner in (_ROOT, os.geteuid()) or (above and owner == _stranger()):
        return
    raise UnsafeError(f"{path} belongs to {_name(owner)}, not to you; set {VARIABLE} to a folder of your own")


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


@cache
def _is_owners_own(group: int, owner: int) -> bool:
    """Whether a group was made for its owner alone: it is the owner's first, has the owner's name and no one else."""
    try:
        user, found = pwd.getpwuid(owner), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def _has_list(path: str) -> bool:
    """Whether there is an access control list: what it allows to others then shows as the group's part of the mode."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False


@cache
def _stranger() -> int | None:
    """Whom the system names as the owner of what belongs to users that do not exist here; None if all of them do.

    In a container that an ordinary user started, the machine's root is one of those, and owns ``/`` and ``/home``.
    """
    try:
        if Path("/proc/self/uid_map").read_text(encoding="ascii").split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
