"""``sd-plugin to-stock``, which works on files alone; what OpenNMT-py makes of the result: test_opennmt_programs."""

from __future__ import annotations

import io
import os
import pickle
import stat
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_plugin import UsageError
from sd_plugin.__main__ import main
from sd_plugin.opennmt import checkpoints

from ..forks import Forks
from ..patience import PATIENCE

WEIGHT = torch.arange(5000.0)


def checkpoint(**options: Any) -> dict[str, Any]:
    """What the host would save, in small."""
    model = torch.nn.LSTM(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 1, 3))[0].sum().backward()
    optimizer.step()
    opt = {"encoder_type": "sd_brnn", "decoder_type": "sd_rnn", "sd_mode": "nr_st", "sd_format": 1, "dropout": [0.3]}
    return {
        "model": {"w": WEIGHT, "p": torch.nn.Parameter(WEIGHT.half()), **model.state_dict()},
        "generator": {"weight": WEIGHT.double()},
        "vocab": {"src": ["<unk>", "ä"], "data_task": "seq2seq"},
        "opt": Namespace(**{**opt, "_all_transform": {"filtertoolong"}, **options}),
        "optim": {"training_step": 3, "optimizer": optimizer.state_dict()},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the checkpoint ``model.pt``."""
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(), tmp_path / "model.pt")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command refuses these arguments."""
    capsys.readouterr()
    assert main(["to-stock", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sd-plugin: error: ") and told.count("\n") == 1, told
    return told.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("strict", [True, False], ids=["torch 2.6 and later", "older"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_only_the_types_change(folder: Path, zipped: bool, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if strict and not checkpoints._TORCH_IS_STRICT:
        pytest.skip("this torch cannot be told of the host's Namespace")
    monkeypatch.setattr(checkpoints, "_TORCH_IS_STRICT", strict)
    torch.save(checkpoint(), "model.pt", _use_new_zipfile_serialization=zipped)
    assert main(["to-stock", "model.pt", "plain.pt"]) == 0
    found, expected = torch.load("plain.pt", weights_only=False), checkpoint()
    options = {"encoder_type": "brnn", "decoder_type": "rnn", "dropout": [0.3], "_all_transform": {"filtertoolong"}}
    assert vars(found["opt"]) == options
    assert found["vocab"] == expected["vocab"] and found["optim"]["training_step"] == 3
    assert found["model"].keys() == expected["model"].keys()
    assert torch.equal(found["model"]["w"], WEIGHT) and torch.equal(found["generator"]["weight"], WEIGHT.double())
    assert sorted(os.listdir(folder)) == ["model.pt", "plain.pt"]


def test_a_file_replaced_keeps_its_rights_and_a_new_one_has_ordinary_ones(folder: Path) -> None:
    (folder / "ordinary").touch()
    assert main(["to-stock", "model.pt", "plain.pt"]) == 0
    assert stat.S_IMODE(os.stat("plain.pt").st_mode) == stat.S_IMODE(os.stat("ordinary").st_mode)
    os.chmod("plain.pt", 0o640)
    os.symlink("plain.pt", "link.pt")
    assert main(["to-stock", "--force", "model.pt", "link.pt"]) == 0
    assert stat.S_IMODE(os.stat("plain.pt").st_mode) == 0o640 and os.path.islink("link.pt")


def test_what_cannot_be_is_one_line_and_nothing_is_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "kept.pt").write_text("something else")
    (folder / "out").mkdir()
    os.symlink("model.pt", "same.pt")
    before = contents(folder)
    for output, told in (
        ("out", "out is a folder: name a file"),
        ("gone/plain.pt", "cannot write gone/plain.pt: No such file or directory"),
        ("kept.pt/plain.pt", "cannot write kept.pt/plain.pt: Not a directory"),
        (f"{'long' * 100}.pt", "long.pt: File name too long"),
        ("model.pt", "model.pt is the checkpoint itself, whose sd_* options would be lost: choose another name"),
        ("same.pt", "same.pt is the checkpoint itself, whose sd_* options would be lost: choose another name"),
        (os.devnull, f"{os.devnull} is no ordinary file: choose another name"),
    ):
        for force in ([], ["--force"]):
            assert refused(capsys, *force, "model.pt", output).endswith(told)
    assert refused(capsys, "model.pt", "kept.pt").endswith("kept.pt exists; --force replaces it")
    for model, told in (
        ("gone.pt", "no such file: gone.pt"),
        ("out", "out cannot be read: Is a directory"),
        ("kept.pt", "kept.pt is not a checkpoint of OpenNMT-py"),
    ):
        assert refused(capsys, model, "plain.pt").endswith(told)
    assert contents(folder) == before and not os.listdir("out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir(mode=0o500)
    assert refused(capsys, "model.pt", "out/plain.pt").endswith("cannot write out/plain.pt: Permission denied")


def test_other_checkpoints_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for saved, told in (
        ([1, 2], "model.pt is not a checkpoint of OpenNMT-py"),
        ({"model": {}}, "model.pt is not a checkpoint of OpenNMT-py"),
        ({"opt": {"encoder_type": "sd_rnn"}}, "model.pt is not a checkpoint of OpenNMT-py"),
        ({"opt": Namespace()}, "encoder None and decoder None are OpenNMT-py's own already"),
        (checkpoint(encoder_type="rnn", decoder_type="ifrnn"), "rnn and decoder ifrnn are OpenNMT-py's own already"),
        (checkpoint(sd_format=9), "newer sd-plugin (format 9, this one reads 1): pip install -U sd-plugin"),
    ):
        torch.save(saved, "model.pt")
        assert refused(capsys, "model.pt", "plain.pt").endswith(told)
    assert os.listdir(folder) == ["model.pt"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_cut_file_is_called_damaged(folder: Path, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(checkpoint(), "model.pt", _use_new_zipfile_serialization=zipped)
    whole = (folder / "model.pt").read_bytes()
    for length in (0, 64, 200, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 1):
        (folder / "cut.pt").write_bytes(whole[:length])
        assert "cut.pt is damaged: it " in refused(capsys, "cut.pt", "plain.pt")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made",)


@pytest.mark.parametrize("strict", [True, False], ids=["torch 2.6 and later", "older"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_no_code_of_a_file_is_run(
    folder: Path, zipped: bool, strict: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = torch.load

    def load(*args: Any, weights_only: bool = False, **kwargs: Any) -> Any:
        return stock(*args, weights_only=weights_only, **kwargs)

    # As before torch 2.6: whoever does not ask for safety has none.
    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(checkpoints, "_TORCH_IS_STRICT", strict and checkpoints._TORCH_IS_STRICT)
    monkeypatch.delenv(checkpoints.TRUST_VARIABLE, raising=False)
    for place in ("opt", "model"):
        evil = checkpoint(evil=Malicious()) if place == "opt" else {**checkpoint(), "model": Malicious()}
        torch.save(evil, "model.pt", _use_new_zipfile_serialization=zipped)
        told = refused(capsys, "model.pt", "plain.pt")
        assert f"holds {os.mkdir.__module__}.mkdir, which torch loads from trusted files only" in told
        assert f"set {checkpoints.TRUST_VARIABLE}=1 if you trust it" in told
    assert os.listdir(folder) == ["model.pt"]
    monkeypatch.setenv(checkpoints.TRUST_VARIABLE, "1")
    assert main(["to-stock", "model.pt", "plain.pt"]) == 0
    assert sorted(os.listdir(folder)) == ["made", "model.pt", "plain.pt"]


def test_a_trusted_file_may_hold_other_types(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(checkpoint(save_model=Path("run")), "model.pt")
    monkeypatch.delenv(checkpoints.TRUST_VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"holds pathlib\.\w+|holds pathlib\._local\.\w+"):
        checkpoints.load("model.pt", as_host=False)
    monkeypatch.setenv(checkpoints.TRUST_VARIABLE, "yes")
    assert checkpoints.load("model.pt", as_host=False)["opt"].save_model == Path("run")
    assert checkpoints.load("model.pt", as_host=True)["opt"].save_model == Path("run")


def test_names_that_are_not_types_are_not_found_in_torch() -> None:
    for name in ("load", "hub", "ops.load_library", "serialization.load"):
        with pytest.raises(pickle.UnpicklingError, match=f"GLOBAL torch.{name}"):
            checkpoints._Unpickler(io.BytesIO()).find_class("torch", name)


IN_A_BARE_PROCESS = """
import resource, sys
class NoHost:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onmt":
            raise ModuleNotFoundError("No module named 'onmt'", name="onmt")
sys.meta_path.insert(0, NoHost())
from sd_plugin.__main__ import main
try:
    main(["to-stock", "--help"])
except SystemExit as ended:
    assert ended.code == 0
assert main(["to-stock", "model.pt", "plain.pt"]) == 0
try:
    from sd_plugin.opennmt import StructuredRNNEncoder
except ImportError as error:
    print(error)
for limit in (10_000, 70_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    assert main(["to-stock", "--force", "model.pt", "kept.pt"]) == 2
"""


def test_it_needs_no_opennmt_and_a_full_disk_loses_nothing(folder: Path) -> None:
    """At the limit of a file's size writing fails as on a full disk."""
    pytest.importorskip("resource")
    (folder / "kept.pt").write_text("a former one")
    before = contents(folder)
    assert len(before["model.pt"]) > 70_000
    command = [sys.executable, "-W", "ignore", "-c", IN_A_BARE_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "usage: sd-plugin to-stock" in done.stdout
    assert "StructuredRNNEncoder needs OpenNMT-py: No module named 'onmt'" in done.stdout
    assert done.stderr == "sd-plugin: error: cannot write kept.pt: File too large\n" * 2
    after = contents(folder)
    torch.load("plain.pt", weights_only=False)
    assert after.pop("plain.pt") and after == before


def test_opennmt_warns_of_nothing_before_the_one_line(folder: Path, fork: Forks) -> None:
    """On a modern torch its import prints a dozen warnings."""
    pytest.importorskip("onmt")
    program = (
        "import sys, warnings; warnings.simplefilter('default');from sd_plugin.__main__ import main; main(sys.argv[1:])"
    )
    for arguments, told in (
        (["model.pt", "plain.pt"], ""),
        (["model.pt", "model.pt"], "sd-plugin: error: model.pt is the checkpoint itself"),
    ):
        done = fork("-c", [program, "to-stock", *arguments], cwd=folder, env=os.environ)
        assert done.stdout == ""
        assert done.stderr.startswith(told) and done.stderr.count("\n") == bool(told), done.stderr


def test_what_a_killed_conversion_left_is_removed_by_the_next(folder: Path, fork: Forks) -> None:
    program = "import sys; from sd_plugin.kernels import leftovers; print(leftovers.partial(sys.argv[1]))"
    done = fork("-c", [program, "plain.pt"], cwd=folder, env=os.environ)
    Path(done.stdout.strip()).write_text("half of a checkpoint")
    assert main(["to-stock", "model.pt", "plain.pt"]) == 0
    assert sorted(os.listdir(folder)) == ["model.pt", "plain.pt"]
