"""Checkpoints of any kind that the host loads, in all programs that read one; and what it does not load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

from sd_plugin import stats
from sd_plugin.opennmt import checkpoints
from sd_plugin.patches import opennmt as patch

from .opennmt_runs import Runs, corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the corpus, and the checkpoint that the tests change."""
    made = tmp_path_factory.mktemp("checkpoints")
    corpus(made)
    return made


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Runs]:
    monkeypatch.delenv(checkpoints.TRUST_VARIABLE, raising=False)
    patch.enable(replace=False)
    runs = Runs(folder, monkeypatch, capsys)
    if not (folder / "first_step_2.pt").exists():
        runs.train("first")
        runs.train("stock", encoder_type="rnn", decoder_type="rnn")
    yield runs
    patch.disable()
    stats.reset()


def change(runs: Runs, source: str, target: str, edit: Callable[[Any], None] | None = None, **saving: Any) -> None:
    """Write a checkpoint anew, changed."""
    loaded = torch.load(runs.folder / source, weights_only=False)
    if edit is not None:
        edit(loaded)
    torch.save(loaded, runs.folder / target, **saving)


def read_everywhere(runs: Runs, checkpoint: str, **types: str) -> None:
    """Resume, translate, average and release it."""
    runs.train("more", train_from=checkpoint, train_steps=3, **types)
    assert (runs.folder / "more_step_3.pt").exists()
    runs.program("translate", "-model", checkpoint, "-src", "text", "-output", "translated", "-beam_size", "2")
    assert (runs.folder / "translated").read_text().count("\n") == 24
    runs.program("average_models", "-models", checkpoint, checkpoint, "-output", "mean.pt")
    runs.program("release_model", "--model", checkpoint, "--output", "released.pt")
    for name in ("more_step_3.pt", "translated", "mean.pt", "released.pt"):
        (runs.folder / name).unlink()


def name_a_path(loaded: Any) -> None:
    loaded["opt"].save_model = Path("run")


@pytest.mark.parametrize("run", ["first", "stock"])
def test_the_format_before_torch_1_6_is_read(runs: Runs, run: str) -> None:
    types = {"encoder_type": "rnn", "decoder_type": "rnn"} if run == "stock" else {}
    change(runs, f"{run}_step_2.pt", "legacy.pt", _use_new_zipfile_serialization=False)
    read_everywhere(runs, "legacy.pt", **types)


def test_a_trusted_file_may_hold_any_type(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    change(runs, "first_step_2.pt", "path.pt", name_a_path)
    monkeypatch.setenv(checkpoints.TRUST_VARIABLE, "1")
    read_everywhere(runs, "path.pt")


def test_options_that_an_older_host_did_not_save_have_their_defaults(runs: Runs) -> None:
    def forget(loaded: Any) -> None:
        for name in ("rnn_type", "dropout_steps", "attention_dropout", "sd_mode", "sd_format"):
            delattr(loaded["opt"], name)

    change(runs, "first_step_2.pt", "old.pt", forget)
    read_everywhere(runs, "old.pt")


def refused(runs: Runs, checkpoint: str, copied: bool = True) -> list[str]:
    """The lines with which training and translation refuse it, and what copies one; nothing is written."""
    (runs.folder / "translated").write_text("a former translation")
    before = {path.name: path.stat().st_mtime_ns for path in runs.folder.iterdir()}
    told = []
    copies = (
        lambda: runs.program("average_models", "-models", "first_step_2.pt", checkpoint, "-output", "copy.pt"),
        lambda: runs.program("release_model", "--model", checkpoint, "--output", "copy.pt"),
    )
    for run in (
        lambda: runs.train("first", train_from=checkpoint),
        lambda: runs.program("translate", "-model", checkpoint, "-src", "text", "-output", "translated"),
        *(copies if copied else ()),
    ):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 2
        told.append(runs.written.splitlines()[-1].removeprefix("sd-plugin: error: "))
    after = {path.name: path.stat().st_mtime_ns for path in runs.folder.iterdir()}
    before["first.yaml"] = after["first.yaml"]
    assert after == before
    return told


def all_of_them(text: str) -> list[str]:
    return [f"train_from: {text}", *[f"model: {text}"] * 3]


@pytest.mark.skipif(not checkpoints._TORCH_IS_STRICT, reason="this torch trusts every file")
def test_what_torch_does_not_trust_is_told(runs: Runs) -> None:
    change(runs, "first_step_2.pt", "path.pt", name_a_path)
    holds = f"path.pt holds {type(Path()).__module__}.{type(Path()).__name__}"
    why = f"which torch loads from trusted files only: set {checkpoints.TRUST_VARIABLE}=1 if you trust it"
    assert refused(runs, "path.pt") == all_of_them(f"{holds}, {why}")


def test_a_file_that_is_none_is_told(runs: Runs) -> None:
    torch.save([1, 2], runs.folder / "list.pt")
    (runs.folder / "empty.pt").write_bytes(b"")
    for name, told in (
        ("list.pt", "list.pt is not a checkpoint of OpenNMT-py"),
        ("text", "text is not a checkpoint of OpenNMT-py"),
        ("empty.pt", "empty.pt is damaged: it is empty"),
        ("gone.pt", "no such file: gone.pt"),
        (".", ". cannot be read: Is a directory"),
    ):
        assert refused(runs, name) == all_of_them(told)


def test_one_of_a_newer_plugin_is_told(runs: Runs) -> None:
    change(runs, "first_step_2.pt", "newer.pt", lambda loaded: setattr(loaded["opt"], "sd_format", 99))
    newer = "this checkpoint was written by a newer sd-plugin (format 99, this one reads 1): pip install -U sd-plugin"
    # To copy one needs no knowledge of its options.
    assert refused(runs, "newer.pt", copied=False) == [f"train_from: {newer}", f"model: {newer}"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_cut_file_is_called_damaged(runs: Runs, zipped: bool) -> None:
    change(runs, "first_step_2.pt", "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (runs.folder / "whole.pt").read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 1):
        (runs.folder / "cut.pt").write_bytes(whole[:length])
        end = "" if zipped else ", or was changed"
        assert refused(runs, "cut.pt") == all_of_them(f"cut.pt is damaged: it ends too early{end}")
