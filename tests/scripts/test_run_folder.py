"""The folder of a run: held by one, gone if nothing came of it, and never another's."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest
import run_folder
from run_folder import MARK, has_result, held

from sd_plugin import UsageError


def test_a_folder_without_a_result_is_gone_and_so_is_what_was_made_for_it(tmp_path: Path) -> None:
    with held(tmp_path / "run" / "a" / "b"):
        assert os.listdir(tmp_path / "run" / "a" / "b") == [MARK]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        assert os.listdir(tmp_path / "mine") == []
    assert os.listdir(tmp_path) == ["mine"]


def test_what_is_prepared_is_no_result(tmp_path: Path) -> None:
    def fail() -> None:
        for name in ("vectors", ".log.csv.partial-12345678-9", ".vectors.partial-12345678-9"):
            (tmp_path / "a" / name).write_text("x")
        raise KeyError

    with pytest.raises(KeyError), held(tmp_path / "a", ("vectors",)):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_told", [True, False])
def test_a_result_stays(tmp_path: Path, is_told: bool) -> None:
    with held(tmp_path / "run" / "a"):
        (tmp_path / "run" / "a" / "log.csv").write_text("x")
        if is_told:
            has_result(tmp_path / "run" / "a")
            assert os.listdir(tmp_path / "run" / "a") == ["log.csv"]
    assert os.listdir(tmp_path / "run" / "a") == ["log.csv"]


def killed(path: Path, *files: str) -> Path:
    """What a run leaves that is killed before its first result."""
    path.mkdir()
    for name in (MARK, *files):
        (path / name).write_text("x")
    return path


def test_the_next_run_takes_away_what_killed_ones_left_and_nothing_else(tmp_path: Path) -> None:
    killed(tmp_path / "empty")
    killed(tmp_path / "half", ".checkpoint.pt.partial-12345678-9")
    killed(tmp_path / "prepared", "vectors")
    kept = [
        killed(tmp_path / "precious", "notes.txt"),
        killed(tmp_path / "in use"),
        tmp_path / "somebody's",
        tmp_path / "link",
    ]
    (tmp_path / "somebody's").mkdir()
    elsewhere = killed(tmp_path.with_name(f"{tmp_path.name}, elsewhere"))
    (tmp_path / "link").symlink_to(elsewhere)
    descriptor = os.open(tmp_path / "in use", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with held(tmp_path / "next", ("vectors",)):
        assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "next"])
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert sorted(os.listdir(tmp_path / "precious")) == sorted([MARK, "notes.txt"])
    assert os.listdir(elsewhere) == [MARK]
    os.close(descriptor)
    with held(tmp_path / "next"):
        assert not (tmp_path / "in use").exists()


def test_a_killed_run_can_be_started_again_in_its_folder(tmp_path: Path) -> None:
    killed(tmp_path / "a", ".checkpoint.pt.partial-12345678-9")
    with held(tmp_path / "a"):
        (tmp_path / "a" / "result").write_text("x")
        has_result(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [".checkpoint.pt.partial-12345678-9", "result"]
    killed(tmp_path / "b")
    with held(tmp_path / "b"):
        pass
    assert not (tmp_path / "b").exists()


def test_one_run_holds_a_folder(tmp_path: Path) -> None:
    with held(tmp_path / "a"):
        with pytest.raises(UsageError, match="a is in use by another run"), held(tmp_path / "a"):
            raise AssertionError
        # The one that was refused did not take it away.
        assert (tmp_path / "a" / MARK).exists()


def test_runs_that_start_and_end_at_once_do_not_take_each_others_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names, four runs, each again and again; every other one ends without a result."""
    monkeypatch.setattr(run_folder, "_PAUSE", 0.001)
    inside = dict.fromkeys("ab", 0)
    faults: list[BaseException] = []
    results = []

    def run(name: str, offset: int) -> None:
        path = tmp_path / "run" / name
        for k in range(40):
            try:
                with held(path):
                    inside[name] += 1
                    assert inside[name] == 1
                    if (k + offset) % 4 == 0:
                        (path / f"result {offset} {k}").write_text("x")
                        has_result(path)
                        results.append(path / f"result {offset} {k}")
                    assert path.is_dir()
                    inside[name] -= 1
            except UsageError:
                continue
            except BaseException as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=run, args=(name, offset)) for offset in range(2) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(results) > 4
    assert all(path.exists() for path in results)


def test_errors_name_what_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, error in ((tmp_path / "file", FileExistsError), (tmp_path / "file" / "x", NotADirectoryError)):
        with pytest.raises(error) as caught, held(path):
            raise AssertionError
        assert caught.value.filename == str(path)
