"""Checkouts of hosts: found where they are looked for, told from other folders, and cloned completely or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sd_plugin.errors import UsageError
from sd_plugin.kernels import leftovers
from sd_plugin.patches._checkout import Checkout, commit_of
from sd_plugin.patches._fingerprint import Function

HOST = Checkout(
    name="some-host",
    origin="nowhere",
    commit="0" * 40,
    variable="SOME_HOST_DIR",
    fingerprints={"layer.py": {"Layer.forward": Function.of("self x", "drop")}, "sub/loss.py": {}},
    needed=("train.py",),
)
FILES = {
    "layer.py": "class Layer:\n    def forward(self, x):\n        return drop(x)\n",
    "sub/loss.py": "",
    "train.py": "",
}


def write(folder: Path, **changes: str | None) -> Path:
    """A checkout in ``folder``; files by name without ending are changed, or left out if None."""
    for name, text in FILES.items():
        text = changes.get(Path(name).stem, text)
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder that is not there yet; the working directory is an empty one."""
    before = os.umask(0o022)
    folder = tmp_path / "cache"
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(folder))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield folder
    os.umask(before)


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., Checkout]:
    """Makes a repository whose last commit but one is a checkout; the host that is cloned from there."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(origin), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def make(**changes: str | None) -> Checkout:
        write(origin, **changes)
        git("init", "--quiet")
        git("add", ".")
        git("commit", "--quiet", "-m", "the host")
        commit = git("rev-parse", "HEAD")
        (origin / "layer.py").write_text("something_else = 1\n")
        git("commit", "--quiet", "-a", "-m", "later")
        return replace(HOST, origin=str(origin), commit=commit)

    origin = tmp_path / "origin"
    origin.mkdir()
    return make


def test_a_checkout_has_no_problem(tmp_path: Path) -> None:
    assert HOST.problem(write(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer": None}, "is not a checkout of some-host: it has no layer.py"),
        ({"loss": None}, "is not a checkout of some-host: it has no sub/loss.py"),
        ({"train": None}, "is not a checkout of some-host: it has no train.py"),
        ({"layer": "value = 1"}, "layer.py is not that of some-host: it has no Layer.forward"),
        ({"layer": "class Layer:\n    def forward(self): drop()"}, "Layer.forward takes (self), not (self x)"),
        ({"layer": "class Layer:\n    def forward(self, x): pass"}, "Layer.forward does not use drop"),
        ({"layer": "print 1"}, "it is not Python (SyntaxError)"),
    ],
)
def test_what_is_no_checkout_is_told_in_one_line(tmp_path: Path, changes: dict[str, str | None], told: str) -> None:
    problem = HOST.problem(write(tmp_path, **changes))
    assert problem is not None
    assert told in problem
    assert str(tmp_path) in problem
    assert "\n" not in problem


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (write(tmp_path) / "layer.py").write_bytes(b"# \xff\xfe\n")
    assert HOST.problem(tmp_path) == f"{tmp_path / 'layer.py'} cannot be read (UnicodeDecodeError)"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert HOST.problem(tmp_path / "none") == f"{tmp_path / 'none'} is not a folder"


def test_edits_that_do_not_concern_the_patch_are_welcome(tmp_path: Path) -> None:
    write(tmp_path, layer="# mine\n" + FILES["layer.py"] + "\n\ndef more(): pass\n", train="print('my own')")
    (tmp_path / "notes.txt").write_text("mine")
    assert HOST.problem(tmp_path) is None


def test_the_variable_comes_before_the_working_directory_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = write(tmp_path / "named")
    kept = write(cache / "hosts" / "some-host")
    assert HOST.candidates({}) == [kept]
    assert HOST.locate(None, {}) == kept.resolve()
    here = write(Path.cwd())
    assert HOST.candidates({}) == [here, kept]
    assert HOST.locate(None, {}) == here.resolve()
    environ = {"SOME_HOST_DIR": f" {named} "}
    assert HOST.candidates(environ) == [named, here, kept]
    assert HOST.locate(None, environ) == named.resolve()
    assert HOST.locate(here, environ) == here.resolve(), "what is given comes first of all"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HOST.candidates({"SOME_HOST_DIR": "~/named"})[0] == named
    assert HOST.candidates({"SOME_HOST_DIR": ""}) == [here, kept]


def test_found_are_all_of_them_with_what_is_wrong(cache: Path, tmp_path: Path) -> None:
    write(Path.cwd(), layer="")
    named, kept = write(tmp_path / "named"), cache / "hosts" / "some-host"
    kept.mkdir(parents=True)
    found = HOST.find({"SOME_HOST_DIR": str(named)})
    assert [finding.where for finding in found] == [str(named), str(Path.cwd()), str(kept)]
    assert found[0].problem is None
    assert "it has no Layer.forward" in str(found[1].problem)
    assert "it has no layer.py" in str(found[2].problem)
    assert {finding.version for finding in found} == {"unknown"}


def test_nothing_is_found_where_nothing_is(cache: Path) -> None:
    assert HOST.find({}) == []
    assert not cache.exists(), "looking makes nothing"


def test_a_wrong_folder_that_was_named_is_an_error_not_passed_over(cache: Path, tmp_path: Path) -> None:
    write(Path.cwd())
    with pytest.raises(UsageError, match="none is not a folder"):
        HOST.locate(None, {"SOME_HOST_DIR": str(tmp_path / "none")})
    with pytest.raises(UsageError, match="is not a checkout of some-host: it has no layer"):
        HOST.locate(tmp_path, {})


def test_something_elses_file_of_the_hosts_name_in_the_working_directory_is_an_error(cache: Path) -> None:
    (Path.cwd() / "layer.py").write_text("class Layer:\n    pass\n")
    with pytest.raises(UsageError, match="here is not a checkout of some-host"):
        HOST.locate(None, {})


def test_the_pinned_commit_is_cloned_once(cache: Path, repository: Callable[..., Checkout]) -> None:
    host = repository()
    folder = host.locate(None, {})
    assert folder == (cache / "hosts" / "some-host").resolve()
    assert (folder / "layer.py").read_text() == FILES["layer.py"], "not the last commit's"
    assert commit_of(folder) == host.commit[:10]
    assert [finding.version for finding in host.find({})] == [host.commit[:10]]
    assert os.listdir(folder.parent) == ["some-host"], "nothing beside it"
    shutil.rmtree(host.origin)
    assert host.locate(None, {}) == folder


def test_a_clone_that_fails_says_what_to_do_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    host = replace(HOST, origin=str(tmp_path / "no repository"))
    with pytest.raises(UsageError) as caught:
        host.locate(None, {})
    told = str(caught.value)
    assert "\n" not in told
    for part in ("no checkout of some-host was found", host.origin, "0000000000", "SOME_HOST_DIR"):
        assert part in told
    assert list((cache / "hosts").iterdir()) == []


def test_a_commit_that_is_not_there_leaves_nothing(cache: Path, repository: Callable[..., Checkout]) -> None:
    host = replace(repository(), commit="1" * 40)
    with pytest.raises(UsageError, match=r"cloning .* failed \(.*1111111111"):
        host.locate(None, {})
    assert list((cache / "hosts").iterdir()) == []


def test_a_clone_that_is_not_the_host_leaves_nothing(cache: Path, repository: Callable[..., Checkout]) -> None:
    host = repository(layer="value = 1")
    with pytest.raises(UsageError, match=rf"at {host.commit[:10]}: .*it has no Layer\.forward"):
        host.locate(None, {})
    assert list((cache / "hosts").iterdir()) == []


def test_without_git(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"FileNotFoundError.*name its folder with SOME_HOST_DIR"):
        HOST.locate(None, {})
    assert commit_of(tmp_path) == "unknown"


def test_two_that_clone_at_once_share_one_clone(cache: Path, repository: Callable[..., Checkout]) -> None:
    host = repository()
    host.obtain()
    folder = host.obtain()  # the other was faster
    assert host.problem(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == [".git", "layer.py", "sub", "train.py"]


def test_a_cache_that_cannot_be_written_says_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(cache))
    with pytest.raises(UsageError, match=r"there is no cache folder.*SOME_HOST_DIR"):
        HOST.locate(None, {})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is when the chosen one cannot be used."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder / f"sd-plugin-{os.geteuid()}"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_a_clone_and_all_above_it_is_private(
    cache: Path, repository: Callable[..., Checkout], monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(cache / "deeper"))
    host = repository()
    before = os.umask(umask)
    try:
        folder = host.locate(None, {})
    finally:
        os.umask(before)
    # git takes the objects of a repository on the same machine as they are, by links.
    within = [path for path in folder.rglob("*") if path.is_dir() or "objects" not in path.parts]
    for path in (cache, cache / "deeper", cache / "deeper" / "hosts", folder, *within):
        assert not path.stat().st_mode & 0o077, path
    assert host.locate(None, {}) == folder


@pytest.mark.parametrize(
    ("place", "how"),
    [
        *itertools.product(["", "hosts", "hosts/some-host"], ["writable", "another's", "a link"]),
        ("hosts/some-host/layer.py", "writable"),
        ("hosts/some-host/layer.py", "another's"),
    ],
)
def test_a_checkout_in_the_cache_that_others_may_have_planted_is_not_used(
    cache: Path, temporary: Path, capfd: pytest.CaptureFixture[str], place: str, how: str
) -> None:
    kept = write(cache / "hosts" / "some-host")
    assert HOST.find({})
    changed = cache / place
    if how == "writable":
        changed.chmod(0o777)
    elif how == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root can give files to another user")
        os.chown(changed, 12345, 12345)
    else:
        changed.rename(cache.parent / "elsewhere")
        changed.symlink_to(cache.parent / "elsewhere")
    capfd.readouterr()
    assert HOST.candidates({}) == HOST.candidates({}) == []
    assert HOST.find({}) == []
    (line,) = capfd.readouterr().err.splitlines()
    assert str(changed) in line
    with pytest.raises(UsageError) as caught:
        HOST.locate(None, {})
    if place.startswith("hosts/"):
        assert f"{kept} is in the way" in str(caught.value)
    else:
        assert "cloning nowhere failed" in str(caught.value), "for the temporary folder"
        assert (temporary / "hosts").is_dir()
    assert HOST.locate(None, {"SOME_HOST_DIR": str(write(cache.parent / "named"))}).name == "named"


def test_a_checkout_planted_among_the_temporary_files_is_not_used(cache: Path, temporary: Path) -> None:
    kept = write(temporary / "hosts" / "some-host")
    assert HOST.candidates({}) == [kept]
    (temporary / "hosts").chmod(0o777)
    assert HOST.candidates({}) == []


def test_what_a_killed_clone_left_is_removed(cache: Path, repository: Callable[..., Checkout]) -> None:
    """The process that cloned is gone; the next one may be anybody's."""
    host = repository()
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = cache / "hosts"
    folder.mkdir(parents=True)
    mine = leftovers.tag()
    theirs = mine.replace(str(os.getpid()), str(ended.pid))
    elsewhere = f"00000000-{ended.pid}"
    for tag in (theirs, elsewhere, mine):
        write(folder / f".cloning-{tag}-abcdefgh" / "some-host")
    host.locate(None, {})
    assert {path.name for path in folder.iterdir()} == {
        "some-host",
        f".cloning-{elsewhere}-abcdefgh",
        f".cloning-{mine}-abcdefgh",
    }


def test_the_commit_of_a_folder_inside_another_repository_is_not_its_own(
    repository: Callable[..., Checkout],
) -> None:
    host = repository()
    assert commit_of(Path(host.origin) / "sub") == "unknown"
