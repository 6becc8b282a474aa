"""Saving a host's files: what an interrupted save leaves, and who removes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from sd_plugin.patches._host_files import AtomicWriter

from ..patience import PATIENCE


def save(path: Path, content: bytes, killed: bool = False) -> None:
    with AtomicWriter(path) as file:
        file.write(content)
        file.flush()
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(path: Path) -> None:
    """In a process of its own, killed while it writes."""
    process = multiprocessing.get_context("fork").Process(target=save, args=(path, b"half", True))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_next_save_removes_what_killed_ones_left(tmp_path: Path, through_a_link: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.pt"
    save(path, b"whole")
    if through_a_link:
        (tmp_path / "link.pt").symlink_to(path)
        path = tmp_path / "link.pt"
    for _ in range(3):
        save_and_die(path)
        assert path.read_bytes() == b"whole"
        assert len(os.listdir(folder)) == 2, "the one before is gone"
    save(path, b"next")
    assert os.listdir(folder) == ["model.pt"]
    assert path.read_bytes() == b"next"


def test_a_save_under_way_is_let_alone(tmp_path: Path) -> None:
    """Two programs that save to the same name: the last one to end has it."""
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()

    def slowly() -> None:
        with AtomicWriter(tmp_path / "model.pt") as file:
            file.write(b"slow")
            file.flush()
            begun.set()
            assert go_on.wait(60)

    process = context.Process(target=slowly)
    process.start()
    assert begun.wait(PATIENCE)
    save(tmp_path / "model.pt", b"fast")
    assert (tmp_path / "model.pt").read_bytes() == b"fast"
    go_on.set()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert (tmp_path / "model.pt").read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["model.pt"]
