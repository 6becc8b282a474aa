"""The dropout of a training that is resumed: the checkpoint's with its schedule, unless the run names its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onmt", reason="OpenNMT-py is not installed")

from sd_plugin import UsageError, stats
from sd_plugin.patches import opennmt as patch

from .opennmt_runs import Runs, corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the corpus, and what the tests train."""
    made = tmp_path_factory.mktemp("resuming")
    corpus(made)
    return made


@pytest.fixture
def runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Runs]:
    patch.enable(replace=False)
    stats.reset()
    yield Runs(folder, monkeypatch, capsys)
    patch.disable()
    stats.reset()


def trained(runs: Runs, run: str, **changes: Any) -> str:
    """A checkpoint of two steps with these options; its name. Made once."""
    if not (runs.folder / f"{run}_step_2.pt").exists():
        runs.train(run, **changes)
    return f"{run}_step_2.pt"


def resumed(runs: Runs, checkpoint: str, *arguments: str, **changes: Any) -> tuple[set[float], list[str]]:
    """Go on for two steps: the shares of units that were dropped at the sites, and what the plugin said of dropout."""
    stats.reset()
    changes = {"attention_dropout": None, "train_steps": 4, **changes}
    log = runs.train("more", *arguments, train_from=checkpoint, **changes)
    shares = {round(site.dropped / site.units, 2) for site in stats.sites().values()}
    return shares, re.findall(r"sd-plugin: (dropout .*)", log)


FROM_CONFIGURATION = "dropout 0.1 → 0.6, from the configuration"
SCHEDULE = {"dropout": [0.0, 0.5], "attention_dropout": [0.0, 0.0], "dropout_steps": [0, 1]}
LATER = {**SCHEDULE, "dropout_steps": [0, 3]}


@pytest.mark.parametrize("decoder_type", ["sd_rnn", "rnn"])
def test_a_run_that_names_none_keeps_the_checkpoints(runs: Runs, decoder_type: str) -> None:
    checkpoint = trained(runs, f"tenth_{decoder_type}", dropout=[0.1], decoder_type=decoder_type)
    assert resumed(runs, checkpoint, decoder_type=decoder_type) == ({0.1}, [])
    assert runs.options("more_step_4.pt").dropout == [0.1]


@pytest.mark.parametrize("by", ["file", "command line", "command line over file"])
def test_a_run_that_names_another_gets_it_and_says_so(runs: Runs, by: str) -> None:
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    arguments = ["-dropout", "0.6"] if "command" in by else []
    changes = {} if by == "command line" else {"dropout": [0.2 if arguments else 0.6]}
    assert resumed(runs, checkpoint, *arguments, **changes) == ({0.6}, [FROM_CONFIGURATION])
    # Whoever goes on from there without naming one keeps that.
    assert runs.options("more_step_4.pt").dropout == [0.6]
    (runs.folder / "more_step_4.pt").rename(runs.folder / "sixth.pt")
    assert resumed(runs, "sixth.pt", train_steps=5)[0] == {0.6}


def test_a_run_may_name_the_hosts_default(runs: Runs) -> None:
    """What is named is not told from its value."""
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    told = ["dropout 0.1 → 0.3, from the configuration"]
    assert resumed(runs, checkpoint, dropout=[0.3]) == ({0.3}, told)
    assert resumed(runs, checkpoint, dropout=[0.1]) == ({0.1}, [])


@pytest.mark.parametrize("reset", ["none", "states", "keep_states", "all"])
def test_it_holds_for_every_way_to_reset_the_optimizer(runs: Runs, reset: str) -> None:
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    assert resumed(runs, checkpoint, reset_optim=reset) == ({0.1}, [])
    assert resumed(runs, checkpoint, reset_optim=reset, dropout=[0.6]) == ({0.6}, [FROM_CONFIGURATION])


def test_overriding_the_options_takes_all_of_the_runs_as_the_host_does(runs: Runs) -> None:
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    assert resumed(runs, checkpoint, "--override_opts") == ({0.3}, [])
    assert "Option: dropout , value: [0.3] overriding model: [0.1]" in runs.written


def test_a_schedule_of_the_checkpoint_goes_on(runs: Runs) -> None:
    checkpoint = trained(runs, "schedule", **SCHEDULE)
    assert resumed(runs, checkpoint) == ({0.5}, ["dropout 0 → 0.5, by its schedule at step 3"])
    assert runs.options("more_step_4.pt").dropout_steps == [0, 1]
    later = trained(runs, "later", **LATER)
    assert resumed(runs, later, train_steps=3) == (set(), [])
    # The host itself applies the change that comes due.
    assert resumed(runs, later)[0] == {0.5}
    assert "Updated dropout/attn dropout to 0.500000 0.000000 at step 4" in runs.written


def test_a_schedule_of_the_run_holds(runs: Runs) -> None:
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    told = ["dropout 0.1 → 0.5, by its schedule at step 3"]
    assert resumed(runs, checkpoint, **SCHEDULE) == ({0.5}, told)
    single = {"dropout": [0.6], "dropout_steps": [3]}
    assert resumed(runs, checkpoint, train_steps=3, **single) == ({0.1}, [])
    assert resumed(runs, trained(runs, "schedule", **SCHEDULE), dropout=[0.2])[0] == {0.2}


def test_what_follows_dropout_follows_and_what_is_fixed_stays(runs: Runs) -> None:
    fixed = {"sd_recurrent_dropout": 0.4, "sd_output_dropout": 0.0, "dropout": [0.1]}
    shares, _ = resumed(runs, trained(runs, "fixed", **fixed), dropout=[0.6])
    assert shares == {0.4, 0.6}


def test_the_host_alone_is_left_as_it_is(runs: Runs) -> None:
    """It ignores the run's value; so does mode ``random``, which is the host's own model."""
    for run, types in (
        ("stock", {"encoder_type": "rnn", "decoder_type": "rnn"}),
        ("random", {"sd_mode": "random"}),
    ):
        checkpoint = trained(runs, run, dropout=[0.1], **types)
        assert resumed(runs, checkpoint, dropout=[0.6], **types) == (set(), [])
        assert runs.options("more_step_4.pt").dropout == [0.1]


def test_what_continues_a_stock_checkpoint_with_structured_dropout_is_told_and_does(runs: Runs) -> None:
    checkpoint = trained(runs, "stock", dropout=[0.1], encoder_type="rnn", decoder_type="rnn")
    with pytest.raises(SystemExit):
        resumed(runs, checkpoint)
    assert runs.written.splitlines()[-1].endswith("set SD_PLUGIN=1, or give --override_opts")
    assert resumed(runs, checkpoint, "--override_opts", dropout=[0.2]) == ({0.2}, [])
    patch.enable(replace=True)
    assert resumed(runs, checkpoint, encoder_type="rnn", decoder_type="rnn") == ({0.1}, [])


STOCK = {"encoder_type": "brnn", "decoder_type": "rnn"}


def test_structured_dropout_is_not_lost_in_silence(runs: Runs) -> None:
    """A checkpoint's own options hold when it is resumed."""
    patch.enable(replace=True)
    checkpoint = trained(runs, "replaced", **STOCK)
    patch.enable(replace=False)
    stats.reset()
    told = runs.train("more", train_from=checkpoint, train_steps=3, **STOCK)
    assert "continues without" in told and "set SD_PLUGIN=1 to keep it" in told
    assert not stats.sites() and "structured dropout report" not in told
    patch.enable(replace=True, mode="nr_st")
    told = runs.train("more", train_from=checkpoint, train_steps=3, **STOCK)
    assert "SD_PLUGIN=nr_st: the checkpoint's sd_mode nr_rh_st holds" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sd_mode": "nr_st"}, "the checkpoint's own (nr_rh_st) holds"),
        ({"sd_recurrent_dropout": 0.1}, "the checkpoint's own (None) holds"),
    ],
)
def test_options_of_the_model_are_the_checkpoints(runs: Runs, changes: dict[str, Any], told: str) -> None:
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    with pytest.raises(SystemExit) as ended:
        runs.train("refused", train_from=checkpoint, **changes)
    assert ended.value.code == 2 and told in runs.written.splitlines()[-1]
    assert "--override_opts" in runs.written.splitlines()[-1]
    assert not list(runs.folder.glob("refused_step*"))


def test_a_probability_out_of_range_is_refused_before_anything_is_read(runs: Runs) -> None:
    checkpoint = trained(runs, "tenth_sd_rnn", dropout=[0.1])
    types = {"encoder_type": "rnn", "decoder_type": "rnn"}
    with pytest.raises(SystemExit) as ended:
        runs.train("refused", train_from=checkpoint, dropout=[1.5], **types)
    assert ended.value.code == 2
    assert runs.written.splitlines()[-1] == "sd-plugin: error: dropout must be in [0, 1), got 1.5"


def test_a_checkpoint_older_than_schedules_is_continued() -> None:
    from argparse import Namespace

    from sd_plugin.opennmt.options import continue_dropout

    run = Namespace(dropout=[0.3], dropout_steps=[0], attention_dropout=[0.1])
    continue_dropout(run, Namespace(dropout=0.2), set())
    assert run == Namespace(dropout=[0.2], dropout_steps=[0], attention_dropout=[0.1])
    with pytest.raises(UsageError, match="dropout must be in"):
        continue_dropout(Namespace(dropout=[0.3, -1.0]), Namespace(dropout=0.2), {"dropout"})
