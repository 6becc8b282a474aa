"""Checkouts of hosts: found where they are looked for, told from other folders, and cloned completely or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sd_plugin.errors import UsageError
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
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; the working directory is an empty one too."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(folder))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


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
    kept = write(HOST.cached())
    assert cache in kept.parents
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
    named, kept = write(tmp_path / "named"), HOST.cached()
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
    assert folder == host.cached().resolve()
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
    assert list(host.cached().parent.iterdir()) == []


def test_a_commit_that_is_not_there_leaves_nothing(cache: Path, repository: Callable[..., Checkout]) -> None:
    host = replace(repository(), commit="1" * 40)
    with pytest.raises(UsageError, match=r"cloning .* failed \(.*1111111111"):
        host.locate(None, {})
    assert list(host.cached().parent.iterdir()) == []


def test_a_clone_that_is_not_the_host_leaves_nothing(cache: Path, repository: Callable[..., Checkout]) -> None:
    host = repository(layer="value = 1")
    with pytest.raises(UsageError, match=rf"at {host.commit[:10]}: .*it has no Layer\.forward"):
        host.locate(None, {})
    assert list(host.cached().parent.iterdir()) == []


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


def test_a_cache_that_cannot_be_written_says_what_to_do(cache: Path) -> None:
    cache.write_text("no folder")
    with pytest.raises(UsageError, match="SOME_HOST_DIR"):
        HOST.locate(None, {})


def test_the_commit_of_a_folder_inside_another_repository_is_not_its_own(
    repository: Callable[..., Checkout],
) -> None:
    host = repository()
    assert commit_of(Path(host.origin) / "sub") == "unknown"
