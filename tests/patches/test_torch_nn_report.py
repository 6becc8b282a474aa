"""What the report says of a program in which nothing could be structured, and of what else was left to torch."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sd_plugin
from sd_plugin import stats

from ..environ import clean
from ..forks import Forks

pytestmark = pytest.mark.usefixtures("unpatched")

K = 16
NOTHING = f"{stats.TITLE}: no unit was dropped"
UNSEEN = "  not seen, so not counted: F.dropout, and dropouts and LSTMs that the program has written itself"


class OwnDropout(nn.Dropout):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class OwnLSTM(nn.LSTM):
    def check_forward_args(self, *arguments: object) -> None:
        pass


def left() -> dict[str, int]:
    """What the report lists, and how often."""
    found = re.findall(r"^    (\S.*): ([\d,]+)$", stats.report(), re.MULTILINE)
    return {what: int(number.replace(",", "")) for what, number in found}


def test_each_call_that_is_left_to_torch_is_counted_by_its_reason() -> None:
    sd_plugin.enable("torch_nn")
    lstm, drop, x = nn.LSTM(K, K), nn.Dropout(0.5), torch.randn(4, 3, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, projected, certain = OwnLSTM(K, K), nn.LSTM(8, 8, proj_size=4), nn.LSTM(K, K, 2, dropout=1.0)
    modules = [nn.GRU(3, 3), nn.GRU(3, 3), nn.LSTMCell(3, 3)]
    for module, argument, times in [
        (drop, x[0], 3),
        (drop, torch.randn(4, 3, 17), 2),
        (drop, torch.randn(4, 3, 19), 1),
        (drop, torch.randn(2, 2, 2, 2), 1),
        (drop, x[0, 0], 1),
        (OwnDropout(0.5), x, 4),
        (lstm, x, 2),
        (own, x, 1),
        (projected, torch.randn(4, 3, 8), 1),
        (certain, x, 1),
    ]:
        for _ in range(times):
            module(argument)
    assert left() == {
        "calls of nn.Dropout on 2-D activations, whose time steps are not known": 3,
        "calls of nn.Dropout on activations of a width that no usable nn.LSTM has (17 units, 19 units)": 3,
        "calls of nn.Dropout on activations of other than three dimensions (1-D, 4-D)": 2,
        "calls of subclasses of nn.Dropout with a forward of their own (OwnDropout)": 4,
        "calls of nn.LSTM with no structured dropout before it, and none of its own": 2,
        "calls of subclasses of nn.LSTM that have changed more than forward (OwnLSTM.check_forward_args)": 1,
        "calls of nn.LSTM with proj_size": 1,
        "calls of nn.LSTM on tensors of another kind, or with dropout=1": 1,
        "recurrent modules other than nn.LSTM (GRU, LSTMCell)": 3,
    }
    assert stats.lines()[0] == NOTHING and stats.lines()[-1] == UNSEEN
    del modules


def test_what_is_torchs_own_anyway_is_not_counted() -> None:
    sd_plugin.enable("torch_nn")
    lstm, x = nn.LSTM(K, K, 2, dropout=0.5), torch.randn(4, 3, K)
    nn.Dropout(0.0)(x[0])
    nn.Dropout(0.5).eval()(x[0])
    lstm.eval()(x)
    assert left() == {}
    assert stats.lines() == [NOTHING, "  nothing of what the patch knows was called in training", UNSEEN]
    sd_plugin.disable("torch_nn")
    assert stats.lines() == [NOTHING]


def test_where_all_is_structured_nothing_is_said_to_be_left() -> None:
    """Pytorch-forecasting's DeepAR, an LSTM of two layers and no other dropout, was told that nothing was called."""
    sd_plugin.enable("torch_nn")
    nn.LSTM(K, K, 2, dropout=0.5)(torch.randn(4, 3, K))
    assert left() == {}
    assert stats.lines()[-2:] == ["  nothing of what the patch knows was left as the program has it", UNSEEN]


def test_a_watched_call_is_counted() -> None:
    sd_plugin.enable("torch_nn")
    lstm = nn.LSTM(K, K)
    torch.vmap(nn.Dropout(0.5), randomness="different")(torch.randn(2, 4, 3, K))
    (what,) = left()
    assert "torch.compile" in what and "torch.func" in what
    del lstm


def test_long_lists_are_cut() -> None:
    sd_plugin.enable("torch_nn")
    for width in range(10, 19):
        nn.Dropout(0.5)(torch.randn(2, 2, width))
    (what,) = left()
    assert what.endswith("(10 units, 11 units, 12 units, 13 units, 14 units, 15 units, …)")


GRU = """
    import torch
    from torch import nn

    model = nn.ModuleDict({"drop": nn.Dropout(0.3), "rnn": nn.GRU(12, 12), "out": nn.Linear(12, 2)})
    for _ in range(5):
        y, _ = model["rnn"](model["drop"](torch.randn(4, 3, 12)))
        model["out"](model["drop"](y)).sum().backward()
"""


def run(program: str, folder: Path, fork: Forks | None = None, **environ: str) -> list[str]:
    """What a patched program says on standard error; in a fork it is the launcher that patches it."""
    kept = clean()
    (folder / "program.py").write_text(textwrap.dedent(program))
    variables = {**kept, "OMP_NUM_THREADS": "1", "SD_PLUGIN": "1", "SD_PLUGIN_TARGETS": "torch", **environ}
    if fork is None:
        command = [sys.executable, "program.py"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    else:
        done = fork("-m", ["sd_plugin", "program.py"], cwd=folder, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_a_program_without_an_lstm_is_told_why(tmp_path: Path) -> None:
    assert run(GRU, tmp_path, SD_PLUGIN_REPORT="1") == [
        NOTHING,
        "  left as the program has it, in training:",
        "    calls of nn.Dropout on activations of a width that no usable nn.LSTM has (12 units): 10",
        "    recurrent modules other than nn.LSTM (GRU): 1",
        UNSEEN,
    ]


@pytest.mark.parametrize(
    ("more", "environ"),
    [
        ("", {}),
        ("import sd_plugin\n    sd_plugin.report()", {"SD_PLUGIN_REPORT": "1"}),
        ("", {"SD_PLUGIN_REPORT": "1", "SD_PLUGIN": "random"}),
    ],
    ids=["not asked for", "told before", "no patch"],
)
def test_nothing_is_told_to_who_does_not_ask_or_was_told(
    more: str, environ: dict[str, str], tmp_path: Path, fork: Forks
) -> None:
    assert run(f"{GRU}\n    {more}", tmp_path, fork, **environ) == []


def test_a_process_of_a_program_of_several_does_not_report_on_nothing(tmp_path: Path) -> None:
    program = """
        import multiprocessing, torch

        def work():
            torch.ones(3)

        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=work)
            process.start()
            process.join()
    """
    told = run(program, tmp_path, SD_PLUGIN_REPORT="1")
    assert told == [NOTHING, "  nothing of what the patch knows was called in training", UNSEEN]
