"""The cache folder: where it is, and that nothing in it is used that somebody else could have put there."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd_plugin.kernels import cache_folder
from sd_plugin.kernels.cache_folder import UnsafeError

STRANGER = 12345
REFUSED = "sd-plugin: the cache is not used as it is: "
Spoil = Callable[[Path], None]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The candidate among the temporary files; the chosen one is ``tmp_path / "cache"``."""
    before = os.umask(0o022)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "temporary" / f"sd-plugin-{os.geteuid()}"
    os.umask(before)


@pytest.fixture
def users_group(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the group of new files that of this user alone, or not quite."""

    def be(name: str = "me", first: int | None = None, members: tuple[str, ...] = ()) -> None:
        group = os.getegid() if first is None else first
        monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="me", pw_gid=group))
        monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_name=name, gr_mem=list(members)))
        cache_folder._is_owners_own.cache_clear()

    yield be
    cache_folder._is_owners_own.cache_clear()


def writable_for_all(path: Path) -> None:
    path.chmod(0o777)


def writable_for_a_group(path: Path) -> None:
    path.chmod(0o770)


def somebody_elses(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    os.chown(path, STRANGER, STRANGER)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def somebody_elses_link(path: Path) -> None:
    a_link(path)
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    os.lchown(path, STRANGER, STRANGER)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SD_PLUGIN_CACHE": "/chosen", "XDG_CACHE_HOME": "/xdg", "HOME": "/home"}, "/chosen"),
        ({"SD_PLUGIN_CACHE": "~/chosen", "HOME": "/home"}, "/home/chosen"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home"}, "/xdg/sd-plugin"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home"}, "/home/.cache/sd-plugin"),
        ({"HOME": "/home"}, "/home/.cache/sd-plugin"),
        ({"HOME": "/"}, "/.cache/sd-plugin"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, temporary: Path, environ: dict[str, str], expected: str) -> None:
    for name in ("SD_PLUGIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cache_folder.candidates() == [Path(expected), temporary]


def test_a_user_without_a_home_has_the_temporary_one(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.delenv("SD_PLUGIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder.candidates() == [temporary]
    assert cache_folder.problem() is None
    assert cache_folder.made("hosts") == temporary / "hosts"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_all_that_is_made_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(umask)
    try:
        made = cache_folder.made("corpora", "one")
    finally:
        os.umask(before)
    assert made == tmp_path / "new" / "cache" / "corpora" / "one"
    for path in (made, made.parent, made.parent.parent, tmp_path / "new"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert cache_folder.existing("corpora", "one") == [made]


def test_looking_makes_nothing(tmp_path: Path) -> None:
    assert cache_folder.existing("hosts") == []
    assert cache_folder.problem() is None
    assert os.listdir(tmp_path) == ["temporary"]


@pytest.mark.parametrize("spoil", [writable_for_all, writable_for_a_group, somebody_elses, a_link])
@pytest.mark.parametrize("place", ["cache", "cache/hosts"])
def test_what_others_can_write_is_replaced_and_told_once(
    tmp_path: Path,
    temporary: Path,
    users_group: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    spoil: Spoil,
    place: str,
) -> None:
    users_group(members=("me", "you"))
    assert cache_folder.made("hosts") == tmp_path / "cache" / "hosts"
    spoil(tmp_path / place)
    for _ in range(2):
        assert cache_folder.existing("hosts") == ([temporary / "hosts"] if temporary.exists() else [])
        assert cache_folder.made("hosts") == temporary / "hosts"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(REFUSED)
    assert str(tmp_path / place) in line
    assert "SD_PLUGIN_CACHE" in line
    assert ("chmod go-w" in line) == (spoil in (writable_for_all, writable_for_a_group))
    assert (cache_folder.problem() is None) == (place == "cache/hosts")


@pytest.mark.parametrize("spoil", [writable_for_all, writable_for_a_group, somebody_elses, somebody_elses_link])
def test_the_folders_above_it_count(
    tmp_path: Path, temporary: Path, users_group: Callable[..., None], spoil: Spoil
) -> None:
    users_group(members=("you",))
    above = tmp_path / "above"
    path = above / "more" / "cache"
    path.mkdir(parents=True)
    with cache_folder.opened(path):
        pass
    spoil(above)
    with pytest.raises(UnsafeError, match=str(above)), cache_folder.opened(path):
        pass
    with pytest.raises(UnsafeError, match=str(above)), cache_folder.opened(above / "new" / "cache", make=True):
        pass
    assert not (above / "new").exists()


def test_a_folder_for_all_in_which_nobody_may_replace_anothers_is_good_enough_above_it(tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o1777)
    with cache_folder.opened(above / "cache", make=True):
        pass
    with pytest.raises(UnsafeError), cache_folder.opened(above):
        pass


@pytest.mark.parametrize("target", ["real", "./real", "sub/../real", "{absolute}"])
def test_a_home_may_be_a_link(tmp_path: Path, target: str) -> None:
    """As where ``/home`` leads to a larger disk."""
    (tmp_path / "real").mkdir()
    (tmp_path / "sub").mkdir()
    home = tmp_path / "home"
    home.symlink_to(target.format(absolute=tmp_path / "real"))
    with cache_folder.opened(home / ".cache" / "sd-plugin", "hosts", make=True):
        assert (tmp_path / "real" / ".cache" / "sd-plugin" / "hosts").is_dir()
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(UnsafeError, match=str(tmp_path / "real")), cache_folder.opened(home / ".cache" / "sd-plugin"):
        pass


def test_links_that_lead_round_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"), cache_folder.opened(tmp_path / "a" / "cache"):
        pass


@pytest.mark.parametrize(
    ("group", "safe"),
    [
        ({}, True),
        ({"members": ("me",)}, True),
        ({"members": ("me", "you")}, False),
        ({"name": "users"}, False),
        ({"first": 54321}, False),
    ],
)
def test_a_group_of_the_users_own_is_not_others(
    tmp_path: Path, users_group: Callable[..., None], group: dict, safe: bool
) -> None:
    """The umask 002 of Debian's and Fedora's users makes ``~/.cache`` writable for it."""
    users_group(**group)
    home = tmp_path / "home"
    (home / ".cache" / "sd-plugin").mkdir(parents=True)
    for path in (home / ".cache", home / ".cache" / "sd-plugin"):
        path.chmod(0o775)
    if safe:
        with cache_folder.opened(home / ".cache" / "sd-plugin"):
            pass
        (home / ".cache").chmod(0o777)
    with pytest.raises(UnsafeError, match="chmod go-w"), cache_folder.opened(home / ".cache" / "sd-plugin"):
        pass


def test_an_access_list_names_others_behind_the_groups_bits(tmp_path: Path, users_group: Callable[..., None]) -> None:
    users_group()
    path = tmp_path / "cache"
    path.mkdir()
    entries = [(1, 7, -1), (2, 7, STRANGER), (4, 5, -1), (16, 7, -1), (32, 5, -1)]  # u, u:STRANGER, g, mask, o
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", listed)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    assert path.stat().st_mode & 0o777 == 0o775
    with pytest.raises(UnsafeError), cache_folder.opened(path):
        pass


def test_a_user_whom_the_system_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by ``docker run --user 1234``."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    cache_folder._is_owners_own.cache_clear()
    assert cache_folder.made() == tmp_path / "cache"
    (tmp_path / "cache").chmod(0o770)
    with pytest.raises(UnsafeError, match="others can write"), cache_folder.opened(tmp_path / "cache"):
        pass
    cache_folder._is_owners_own.cache_clear()


def test_roots_cache_is_read_by_others(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image may hold one. Who cannot write to it makes things elsewhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can make folders of root's")
    (tmp_path / "cache" / "hosts").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert cache_folder.existing("hosts") == [tmp_path / "cache" / "hosts"]
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(OSError, match="Permission denied"):
        cache_folder.made("hosts")


def test_no_folder_at_all_says_what_to_do(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    assert cache_folder.made() == temporary
    temporary.chmod(0o777)
    with pytest.raises(OSError, match=rf"others can write to {temporary}.*set SD_PLUGIN_CACHE to a folder"):
        cache_folder.made()
    assert f"{tmp_path / 'file'} is not a folder" in str(cache_folder.problem())


@pytest.mark.parametrize("named", ["file", "file/cache", "pipe", "round/cache", "~no-such-user/cache"])
def test_what_is_named_and_cannot_be_a_folder_is_told_once(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], named: str
) -> None:
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to("round")
    monkeypatch.setenv("SD_PLUGIN_CACHE", named if named.startswith("~") else str(tmp_path / named))
    cache_folder._tell.cache_clear()
    for _ in range(2):
        assert cache_folder.existing("hosts") == ([temporary / "hosts"] if temporary.exists() else [])
        assert cache_folder.made("hosts") == temporary / "hosts"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(REFUSED) and line.endswith("; set SD_PLUGIN_CACHE to a folder that only you can write to")
    culprit, reason = {
        "file": (tmp_path / "file", " is not a folder"),
        "file/cache": (tmp_path / "file", " is not a folder"),
        "pipe": (tmp_path / "pipe", " is not a folder"),
        "round/cache": (tmp_path / "round", ": Too many levels of symbolic links"),
        "~no-such-user/cache": (f"SD_PLUGIN_CACHE={named}", ": there is no such home"),
    }[named]
    assert f"{culprit}{reason};" in line
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_told_where_it_was_asked_for(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make = os.mkdir

    def read_only(path: str, *arguments: object, **options: object) -> None:
        if path in ("cache", "hosts", "sd-plugin"):
            raise OSError(30, "Read-only file system", path)
        make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    temporary.mkdir(mode=0o700)
    cache_folder._tell.cache_clear()
    with cache_folder.opened(temporary):
        pass
    with pytest.raises(OSError, match="there is no cache folder"):
        cache_folder.made("hosts")
    told = f"{tmp_path / 'cache'}: Read-only file system; set SD_PLUGIN_CACHE to a folder that only you can write to"
    assert capfd.readouterr().err == f"{REFUSED}{told}\n"
    # One that is there, but for a sub-folder, may be read; and nobody asked for the usual one.
    make(tmp_path / "cache", 0o700)
    with pytest.raises(OSError, match="there is no cache folder"):
        cache_folder.made("hosts")
    monkeypatch.delenv("SD_PLUGIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder.made() == temporary
    (tmp_path / "sd-plugin").touch()
    assert cache_folder.made() == temporary
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_made_is_a_problem_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder.problem() is None
    # The administrator can write everywhere.
    monkeypatch.setattr(os, "access", lambda path, *_, **__: Path(path) != tmp_path)
    path = tmp_path / "more" / "cache"
    assert (
        cache_folder.problem({"SD_PLUGIN_CACHE": str(path)}) == f"{path} cannot be made: {tmp_path} cannot be written"
    )
    assert cache_folder.problem({"XDG_CACHE_HOME": str(path)}) is None, "a home may be read-only"
    assert "no such home" in str(cache_folder.problem({"SD_PLUGIN_CACHE": "~no-such-user/cache"}))


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_a_file_that_only_its_owner_writes_is_opened(tmp_path: Path, mode: int) -> None:
    path = cache_folder.made() / "file"
    path.write_text("content")
    path.chmod(mode)
    with cache_folder.opened(path.parent) as folder, open(cache_folder.open_file(folder, path)) as file:
        assert file.read() == "content"


@pytest.mark.parametrize("how", ["writable", "somebody else's", "a link", "a pipe", "a folder"])
def test_a_file_that_others_may_have_written_is_not_opened(tmp_path: Path, how: str) -> None:
    path = cache_folder.made() / "file"
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    else:
        path.touch()
        {"writable": writable_for_all, "somebody else's": somebody_elses, "a link": a_link}[how](path)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"file|links"), cache_folder.opened(path.parent) as folder:
        cache_folder.open_file(folder, path)
    assert os.listdir("/proc/self/fd") == descriptors


def test_what_is_opened_lies_in_the_folder_that_was_checked(tmp_path: Path) -> None:
    """Whatever took its place meanwhile."""
    path = cache_folder.made() / "file"
    path.write_text("checked")
    with cache_folder.opened(path.parent) as folder:
        path.parent.rename(tmp_path / "away")
        path.parent.mkdir()
        path.write_text("planted")
        with open(cache_folder.open_file(folder, path)) as file:
            assert file.read() == "checked"


IN_A_CONTAINER = """
import os
from pathlib import Path
from sd_plugin.kernels import cache_folder
print(os.stat("/").st_uid, cache_folder.made("hosts"))
"""


def test_in_a_container_of_an_ordinary_user(tmp_path: Path) -> None:
    """Where what is above the home belongs to the machine's root, whom the container does not know."""
    inside = ["unshare", "--user", "--map-user=1234", "--map-group=1234"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let a user have namespaces")
    if os.geteuid() == 0:
        # The namespace then knows root's files as those of user 1234, and no others.
        above = tmp_path / "above"
        (above / "home").mkdir(parents=True)
        os.chown(above, STRANGER, STRANGER)
        home = above / "home"
    else:
        home = tmp_path
    environ = {**os.environ, "SD_PLUGIN_CACHE": str(home / "cache")}
    command = [*inside, sys.executable, "-c", IN_A_CONTAINER]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == str(home / "cache" / "hosts"), done.stderr
