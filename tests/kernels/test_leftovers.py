"""What a killed process leaves is removed by the next; what somebody works on is not."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest

from sd_plugin.kernels import leftovers

from ..patience import PATIENCE


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def tag(process: int, machine: str | None = None) -> str:
    mine = leftovers.tag().partition("-")[0]
    return f"{machine or mine}-{process}"


DAY = 24 * 3600


@pytest.mark.parametrize("days", [0, 2])
@pytest.mark.parametrize("who", ["gone", "running", "me", "elsewhere", "untold"])
def test_who_is_gone_leaves_nothing(tmp_path: Path, gone: int, who: str, days: int) -> None:
    tags = {
        "gone": tag(gone),
        "running": tag(os.getppid()),
        "me": leftovers.tag(),
        "elsewhere": tag(gone, "0123abcd"),
        "untold": str(gone),  # as earlier versions did
    }
    path = tmp_path / f"model.pt.partial-{tags[who]}"
    path.touch()
    os.utime(path, times=(time.time() - days * DAY,) * 2)
    others = [tmp_path / f"{name}.partial-{tag(gone)}" for name in ("model.ptx", "other.pt", "model.pt.partial-x")]
    for other in others:
        other.touch()
    partial = leftovers.partial(tmp_path / "model.pt")
    assert partial == tmp_path / f"model.pt.partial-{leftovers.tag()}"
    assert path.exists() == (who != "gone" and days == 0)
    assert all(other.exists() for other in others[:2]), "they are not of this file"


def test_folders_links_and_names_with_wildcards(tmp_path: Path, gone: int) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    folder, link = tmp_path / f".made-{tag(gone)}-x", tmp_path / f".made-{tag(gone)}-y"
    (folder / "below").mkdir(parents=True)
    (folder / "link").symlink_to(kept)
    link.symlink_to(kept)
    leftovers.remove(tmp_path, ".made-*")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()
    odd, even = (tmp_path / f"{name}.partial-{tag(gone)}" for name in ("a[bc]", "ab"))
    odd.touch()
    even.touch()
    leftovers.partial(tmp_path / "a[bc]")
    assert (odd.exists(), even.exists()) == (False, True)
    leftovers.remove(tmp_path / "none", "*")


def test_two_may_clean_up_at_once(tmp_path: Path, gone: int) -> None:
    for number in range(200):
        (tmp_path / f".made-{tag(gone)}-{number}" / "below").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    cleaners = [context.Process(target=leftovers.remove, args=(tmp_path, ".made-*")) for _ in range(3)]
    for cleaner in cleaners:
        cleaner.start()
    for cleaner in cleaners:
        cleaner.join(PATIENCE)
        assert cleaner.exitcode == 0
    leftovers.remove(tmp_path, ".made-*")
    assert list(tmp_path.iterdir()) == []


def test_a_child_has_a_tag_of_its_own() -> None:
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=lambda: told.put(leftovers.tag()))
    child.start()
    child.join()
    assert told.get() == tag(child.pid or 0) != leftovers.tag()
