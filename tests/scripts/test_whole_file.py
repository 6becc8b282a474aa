"""The one function that writes a file of the programs in ``scripts/`` whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from whole_file import write_whole

from sd_plugin.kernels import leftovers

from ..forks import Forks


@pytest.mark.parametrize("content", ["new \n", b"new \n", memoryview(b"new \n")], ids=["text", "bytes", "memory"])
def test_it_takes_the_place_of_the_old_one(tmp_path: Path, content: str | bytes | memoryview) -> None:
    (tmp_path / "file").write_text("old")
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"new \n"
    assert os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \ud800")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(file, "new")
    assert caught.value.filename == str(file)
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "old"


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path: Path, fork: Forks) -> None:
    program = "import sys; from sd_plugin.kernels import leftovers; print(leftovers.partial(sys.argv[1]))"
    done = fork("-c", [program, tmp_path / ".file"], cwd=tmp_path, env=os.environ)
    Path(done.stdout.strip()).write_text("half of a fi")
    other = tmp_path / f".other.partial-{leftovers.tag()}"
    other.write_text("of a process that runs")
    write_whole(tmp_path / "file", "whole")
    assert sorted(os.listdir(tmp_path)) == [other.name, "file"]
