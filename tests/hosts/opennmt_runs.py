"""Runs OpenNMT-py's own programs in this process, on a few sentences: to start one costs more than all it does then."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

WORDS = [f"w{i}" for i in range(12)]
TINY = {
    "src_vocab": "vocab",
    "tgt_vocab": "vocab",
    "data": {
        "train": {"path_src": "text", "path_tgt": "text", "transforms": [], "weight": 1},
        "valid": {"path_src": "text", "path_tgt": "text", "transforms": []},
    },
    "encoder_type": "sd_rnn",
    "decoder_type": "sd_rnn",
    "layers": 2,
    "hidden_size": 10,
    "word_vec_size": 10,
    "batch_size": 8,
    "optim": "adam",
    "learning_rate": 0.01,
    "train_steps": 2,
    "valid_steps": 100,
    "seed": 3,
    "num_workers": 0,
    "bucket_size": 100,
    "world_size": 1,
    "gpu_ranks": [],
}


def corpus(folder: Path) -> None:
    """Write twenty-four sentences and their vocabulary."""
    lines = [" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(3 + i % 4)) for i in range(24)]
    (folder / "text").write_text("\n".join(lines) + "\n")
    (folder / "vocab").write_text("".join(f"{word}\t1\n" for word in WORDS))


def program(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``onmt_NAME`` with these arguments, as its console script runs it in a process that the plugin has patched."""
    from sd_plugin.patches import opennmt as patch

    module = importlib.import_module(f"onmt.bin.{name}")
    patch.on_import(module)
    monkeypatch.setattr(sys, "argv", [f"onmt_{name}", *arguments])
    module.main()


class Runs:
    """Trainings in one folder.

    Args:
        folder: with the corpus; it is made the working directory.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)
        # The host raises its console's handler beside this one's.
        self._capsys.readouterr()

    def program(self, name: str, *arguments: str) -> str:
        """Run it; what it wrote."""
        self._capsys.readouterr()
        try:
            program(name, list(arguments), self._monkeypatch)
        finally:
            written = self._capsys.readouterr()
            self.written = written.out + written.err
        return self.written

    def train(self, run: str, *arguments: str, **changes: Any) -> str:
        """``onmt_train`` into ``run_step_*.pt``; the log. A change to None leaves the key out."""
        values = {key: value for key, value in {**TINY, "save_model": run, **changes}.items() if value is not None}
        (self.folder / f"{run}.yaml").write_text(yaml.safe_dump(values))
        return self.program("train", "-config", f"{run}.yaml", *arguments)

    def options(self, checkpoint: str) -> Any:
        """The options in a checkpoint."""
        return torch.load(self.folder / checkpoint, weights_only=False)["opt"]
