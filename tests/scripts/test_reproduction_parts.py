"""What ``reproduce.py`` stands on: rows, results, what is read from the hosts' files, and the page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# Without these the package cannot be imported.
pytest.importorskip("matplotlib")
pytest.importorskip("platformdirs")
pytest.importorskip("pydantic")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("yaml")
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_model_data import sequences
from reproduction import dense_baseline, environment, estimates, page, results, rows
from reproduction.job import Job, Step, attempts, heading, report
from reproduction.results import Result
from reproduction.systems import SYSTEMS
from training_settings import read_settings
from zaremba_main import LanguageModel

from sd_plugin.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def job_of(name: str, folder: Path, **changes: Any) -> Job:
    """A whole job of a row."""
    (row,) = rows.select([name])
    python = Path(sys.executable)
    return replace(Job(row, row.seed, row.length, "cpu", 1, False, folder, ROOT, python), **changes)


def result(**changes: Any) -> Result:
    """A result that is valid, with changes."""
    values = {
        "row": "table1/medium/nr_rh_st",
        "seed": 1234,
        "length": 39,
        "unit": "epochs",
        "of": 39,
        "full": True,
        "metrics": {"train_perplexity": 50.0, "valid_perplexity": 83.64, "test_perplexity": 80.84},
        "seconds": 1000.0,
        "undisturbed": True,
        "skipped": 0.5,
        "hints_lost": 0,
        "precision": "fp32",
        "backend": "cpu",
        "machine": {"cpu": "A processor", "threads": 2, "device": "cpu"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": None},
        "commit": "0123456789" * 4,
        "dirty": False,
        "command": ["python scripts/zaremba_main.py"],
        "notes": [],
        "date": "2026-11-28T12:00:00+00:00",
    }
    return Result.model_validate({**values, **changes})


def saved(folder: Path, *wanted: Result) -> list[results.Saved]:
    """Results with a curve each, written and read again."""
    for one in wanted:
        end = one.metrics.get("valid_perplexity", 100.0)
        curve = [
            {one.unit[:-1]: at, "seconds": 10.0, "valid_perplexity": end + 200.0 / at - 200.0 / one.length}
            for at in range(1, one.length + 1)
        ]
        results.save(one, curve, results.folder_of(folder, one.row, one.seed))
    return list(results.scan(folder))


# -------------------------------------------------------------------------------------------------- rows


def test_every_row_of_the_paper_is_there_with_its_figures() -> None:
    figures = {row.name: tuple(row.paper.values()) for row in rows.ROWS if row.paper}
    assert len(figures) == 3 + 3 + 2 + 3 + 3 + 3
    assert figures["table1/medium/random"] == (86.20, 82.70)
    assert figures["table1/large/nr_rh_st"] == (79.38, 76.05)
    assert figures["table2/envi/nr_st"] == (26.08,)
    assert figures["table3/ner/nr_rh_st"] == (89.49,)
    assert all(set(row.paper) <= set(row.metrics) <= set(rows.METRICS) for row in rows.ROWS)


def test_rows_are_as_long_as_their_configurations() -> None:
    import yaml

    for row in (row for row in rows.ROWS if row.config):
        config = yaml.safe_load((ROOT / row.config).read_text(encoding="utf-8"))
        assert row.length == config["epochs" if row.unit == "epochs" else "train_steps"], row.name
        assert row.seed == config["seed"], row.name
        assert row.data in str(config["data"]), row.name


def test_names_select_rows_by_their_beginning() -> None:
    assert [row.name for row in rows.select(["fig3", "table1/medium"])] == [
        f"table1/medium/{mode}" for mode in ("random", "nr_st", "nr_rh_st")
    ]
    assert [row.name for row in rows.select(["fig3/nr_st"])] == ["table1/medium/nr_st"]
    with pytest.raises(UsageError, match=r"unknown row 'table1/med'; there are table1/medium, .* small/multi30k"):
        rows.select(["table1/med"])


# ----------------------------------------------------------------------------------------------- results


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    one = result()
    (back,) = saved(tmp_path, one)
    assert back.result == one
    assert [point["epoch"] for point in back.curve] == list(range(1, 40))
    assert back.seconds_per_unit() == 10.0
    text = json.loads((tmp_path / one.row / "seed1234" / "result.json").read_text())
    assert (text["kind"], text["schema"]) == ("sd-plugin reproduction", 1)
    named = {"row", "seed", "length", "unit", "full", "metrics", "seconds", "skipped", "hints_lost", "precision"}
    assert named | {"backend", "machine", "versions", "commit", "command"} <= set(text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"kind": "sd-plugin bench"}, "kind"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"commit": "HEAD"}, "commit"),
        ({"length": 40}, "full, but 40 of 39 epochs"),
        ({"metrics": {}}, "metrics"),
    ],
)
def test_a_folder_of_another_schema_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    (one,) = saved(tmp_path, result())
    path = one.folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=re.escape(f"{path} is not of schema 1 of reproduce.py: ") + f".*{told}"):
        list(results.scan(tmp_path))


def test_results_that_contradict_their_place_or_curve_are_named(tmp_path: Path) -> None:
    (one,) = saved(tmp_path, result())
    curve = one.folder / "curve.csv"
    curve.write_text("epoch,seconds\n2,1\n1,1\n")
    with pytest.raises(UsageError, match=r"curve\.csv is no curve: its column epoch must be there and ascend"):
        results.load(one.folder)
    elsewhere = tmp_path / "table1" / "medium" / "nr_st" / "seed1234"
    shutil.copytree(one.folder, elsewhere)
    with pytest.raises(UsageError, match="is of row table1/medium/nr_rh_st, seed 1234, and lies in another folder"):
        results.load(elsewhere)


def test_a_curve_keeps_every_number_to_the_last_bit_also_of_a_run_that_diverged(tmp_path: Path) -> None:
    one = result(length=3, full=False)
    values = [0.1 + 0.2, math.inf, None]
    curve = [{"epoch": at + 1, "seconds": 1e-9, "valid_perplexity": value} for at, value in enumerate(values)]
    results.save(one, curve, results.folder_of(tmp_path, one.row, one.seed))
    (back,) = results.scan(tmp_path)
    assert back.curve == curve


def test_a_longer_run_may_replace_a_shorter_result_and_no_other(tmp_path: Path) -> None:
    short = result(length=15, full=False)
    saved(tmp_path, short)
    results.check_free(tmp_path, short.row, 1234, 39, force=False)
    results.check_free(tmp_path, short.row, 1, 10, force=False)
    with pytest.raises(UsageError, match=r"holds a result already \(shortened: 15 of 39 epochs\); --force replaces it"):
        results.check_free(tmp_path, short.row, 1234, 15, force=False)
    results.check_free(tmp_path, short.row, 1234, 15, force=True)
    # Killed between the two files: the run goes on, and writes both again.
    (tmp_path / short.row / "seed1234" / "result.json").unlink()
    results.check_free(tmp_path, short.row, 1234, 15, force=False)
    assert list(results.scan(tmp_path)) == []


def test_committed_results_are_valid() -> None:
    for one in results.scan(RESULTS / "reproduce"):
        assert not one.result.dirty, one.folder
        assert not re.search(r"(^| )/", " ".join([*one.result.command, *map(str, one.result.machine.values())]))


# ------------------------------------------------------------------------------------- the hosts' files


@given(st.lists(st.tuples(st.integers(0, 99), st.text("ab|# 1\n", max_size=20)), max_size=4))
def test_a_log_tells_where_each_process_began(wanted: list[tuple[int, str]]) -> None:
    log = "".join(heading(Step([], since), "epochs") + text for since, text in wanted)
    assert [(since, text.strip("\n")) for since, text in attempts(log)] == [
        (since, text.strip("\n")) for since, text in wanted
    ]


def test_awd_lstm_is_read_and_goes_on_after_its_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a real log, cut off; then a process that went on."""
    system, job = SYSTEMS["awd_lstm"], job_of("table1/awd-lstm/nr_rh_st", tmp_path, length=4)
    monkeypatch.setattr(sys.modules["reproduction.systems.awd_lstm"], "locate", lambda checkout: tmp_path)
    text = (RESULTS / "awd_lstm" / "nr_rh_st.log").read_text()
    job.log("train").write_text(heading(Step([]), "epochs") + text[: text.index("| epoch   3")])
    assert system.step(job, "train").since == 0, "there is no model"
    torch.save([1], tmp_path / "model.pt")
    step = system.step(job, "train")
    assert step.since == 2
    assert step.command[-4:] == ["--epochs", "2", "--resume", "model.pt"]
    with job.log("train").open("a") as log:
        log.write(heading(step, "epochs") + text)
    assert [(point["epoch"], point["valid_perplexity"]) for point in system.curve(job)] == [
        (1, 1296.00), (2, 1018.80), (3, 1296.00), (4, 1018.80), (5, 981.86)
    ]  # fmt: skip
    outcome = system.outcome(job)
    assert outcome.metrics == {"valid_perplexity": 981.86, "test_perplexity": 996.68}
    assert (outcome.skipped, outcome.hints_lost, outcome.backend) == (0.403, 0, "cpu")
    # A file that was being written as its process was killed.
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:-50])
    assert system.step(job, "train").since == 0


def test_opennmt_is_read_and_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    system, job = SYSTEMS["opennmt"], job_of("table2/envi/nr_rh_st", tmp_path, length=300)
    text = (RESULTS / "envi_sd.log").read_text()
    part = text[: text.index("Step 225/")]
    job.log("train").write_text(heading(Step([]), "steps") + part)
    assert system.progress(job)[0] == 200
    # It is killed, and goes on from step 100.
    models = tmp_path / "run" / "iwslt_envi_sd"
    models.mkdir(parents=True)
    for at in (100, 200):
        torch.save(at, models / f"model_step_{at}.pt")
    (models / "model_step_200.pt").write_bytes(b"PK")
    step = system.step(job, "train")
    assert step.since == 100
    assert step.command[-2:] == ["-train_from", "run/iwslt_envi_sd/model_step_100.pt"]
    with job.log("train").open("a") as log:
        log.write(heading(step, "steps") + text[text.index("Step 125/") :])
    job.log("score-300").write_text(heading(Step([]), "steps") + '{\n "score": 12.5,\n "signature": "nrefs:1"\n}\n')
    curve = system.curve(job)
    assert [point["step"] for point in curve] == [100, 200, 300]
    assert [point["valid_perplexity"] for point in curve] == [501.245, 269.369, 198.286]
    outcome = system.outcome(job)
    assert outcome.metrics == {"train_perplexity": 223.9, "valid_perplexity": 198.286, "test_bleu": 12.5}
    assert (outcome.skipped, outcome.hints_lost, outcome.backend) == (0.301, 0, "reference")
    # Seconds until step 100, and those that the second process told at its end.
    first, last = (re.search(rf"Step {at}/.* (\d+) sec;", text) for at in ("100", "300"))
    assert first and last
    assert outcome.seconds == int(first[1]) + int(last[1])
    (models / "model_step_300.pt").touch()
    system.tidy(job, finished=False)
    assert len(list(models.iterdir())) == 2
    system.tidy(job, finished=True)
    assert [path.name for path in models.iterdir()] == ["model_step_300.pt"]


def test_opennmt_scores_every_checkpoint_that_its_configuration_keeps(tmp_path: Path) -> None:
    system, job = SYSTEMS["opennmt"], job_of("table2/envi/nr_st", tmp_path, length=15_000)
    scored = [name for name in system.steps(job) if name.startswith("score")]
    assert scored == ["score-5000", "score-10000", "score-15000"]
    assert "beyond 5,000 it must be a multiple" in (system.problem(replace(job, length=12_000)) or "")
    short = system.step(replace(job, length=30), "train").command
    assert short[short.index("-train_steps") :] == ["-train_steps", "30", "-valid_steps", "30", "-report_every", "30"]
    assert "vocabulary" not in system.steps(job)
    assert "vocabulary" in system.steps(job_of("small/multi30k/random", tmp_path))


def test_zaremba_is_read(tmp_path: Path) -> None:
    system, job = SYSTEMS["zaremba"], job_of("table1/medium/nr_rh_st", tmp_path, length=2)
    (tmp_path / "model").mkdir()
    for ending, name in ((".csv", "log.csv"), (".json", "result.json")):
        shutil.copy(RESULTS / "zaremba_medium" / f"nr_rh_st{ending}", tmp_path / "model" / name)
    job.log("train").write_text((RESULTS / "awd_lstm" / "nr_rh_st.log").read_text())
    outcome = system.outcome(job)
    assert (outcome.length, outcome.skipped, outcome.hints_lost, outcome.backend) == (2, 0.5, 0, "cpu")
    assert {name: round(value, 1) for name, value in outcome.metrics.items()} == {
        "train_perplexity": 195.8, "valid_perplexity": 166.4, "test_perplexity": 163.5
    }  # fmt: skip
    assert outcome.seconds == pytest.approx(174.912 + 168.855)
    assert "--epochs" in system.step(job, "train").command
    # Killed between its last epoch and the test, so that no process has counted anything.
    job.log("train").unlink()
    assert system.outcome(job).hints_lost is None


def test_the_baseline_is_dense_unless_stock_is_asked_for(tmp_path: Path) -> None:
    system, dense = SYSTEMS["zaremba"], job_of("table1/large/random", tmp_path)
    assert "reproduction/dense_baseline.py" in system.step(dense, "train").command[1]
    assert system.step(replace(dense, stock=True), "train").command[1].endswith("scripts/zaremba_main.py")


def test_a_run_has_the_threads_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has MKL, that variable of its own overrules OpenMP's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    variables = job_of("table1/medium/nr_rh_st", tmp_path, threads=3).environment()
    assert variables["OMP_NUM_THREADS"] == "3" and "MKL_NUM_THREADS" not in variables


def test_targer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, job = SYSTEMS["targer"], job_of("table3/ner/random", tmp_path, length=3)
    monkeypatch.setattr(sys.modules["reproduction.systems.targer"], "locate", lambda checkout: tmp_path)
    (tmp_path / "ner").mkdir()
    for name, target in (("random.csv", "epochs.csv"), ("random.json", "result.json")):
        shutil.copy(RESULTS / "ner" / name, tmp_path / "ner" / target)
    outcome = system.outcome(job)
    assert outcome.metrics == {"valid_f1": 62.27, "test_f1": 59.79}
    assert outcome.length == 3 and outcome.notes == ["random word vectors, where the paper has GloVe's"]
    assert system.progress(job) == (3, "valid f1 62.27, test f1 59.79")


def test_a_report_is_read_from_the_last_one_in_a_log() -> None:
    text = (RESULTS / "awd_lstm" / "nr_rh_st.log").read_text()
    changed = text.replace("backend: cpu", "backend: reference").replace("40.3%)", "30.0%)")
    found = report(text + changed)
    assert found is not None
    assert (found.backend, found.skipped, found.hints_lost) == ("reference", 0.3, 0)
    assert report("nothing of it") is None


# --------------------------------------------------------------------------------------- dense baseline


def _trained(kind: type[LanguageModel], seed: int) -> tuple[list[float], LanguageModel]:
    """The losses of a few steps with random dropout, and the model after them."""
    changes = {"mode": "random", "hidden_size": 48, "batch_size": 4, "sequence_length": 7, "data": "none"}
    settings = read_settings(ROOT / "configs" / "zaremba_medium.yaml", changes)
    # Every word follows from the one before it.
    text = (torch.arange(7 * 8 + 1).unsqueeze(1) * 3 + torch.arange(4)) % 11
    torch.manual_seed(seed)
    model, state = kind(60, settings), None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for words, targets in sequences(text, 7):
        loss, state = model(words, targets, state)
        optimizer.zero_grad()
        (loss / 7).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        state = (state[0].detach(), state[1].detach())
        losses.append(loss.item())
    return losses, model


def test_the_dense_baseline_computes_what_the_stock_one_does() -> None:
    """The same first parameters and masks from the same seed; losses and parameters agree to float32's rounding."""
    stock, model = _trained(LanguageModel, 1)
    ours, dense = _trained(dense_baseline.DenseBaseline, 1)
    other, _ = _trained(LanguageModel, 2)
    assert dense.lstm.native is False
    assert stock[-1] < 0.9 * stock[0], "it learns"
    torch.testing.assert_close(ours, stock, rtol=2e-6, atol=0)
    assert all(abs(a - b) > 1e-5 * a for a, b in zip(stock, other, strict=True)), "other masks would show"
    for (name, parameter), wanted in zip(dense.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-4, atol=1e-6, msg=name)


# -------------------------------------------------------------------------------------------- estimates


def test_estimates_come_from_own_results_and_else_from_the_benchmark(tmp_path: Path) -> None:
    (medium,) = rows.select(["table1/medium/nr_rh_st"])
    (small,) = rows.select(["small/multi30k/nr_st"])
    known = estimates.Estimates([], RESULTS / "cpu.json")
    found = known.of(medium)
    assert found is not None and found.source == "cpu.json"
    steps = json.loads((RESULTS / "cpu.json").read_text())["workloads"]["zaremba-medium"]["columns"]["nr_rh_st"][
        "step_ms"
    ]
    assert min(steps) * 1.327 <= found.seconds_per_unit <= max(steps) * 1.327
    assert known.of(small) is None
    own = estimates.Estimates(saved(tmp_path, result()), tmp_path / "none.json").of(medium)
    assert own == estimates.Estimate(10.0, "seed 1234")


# ------------------------------------------------------------------------------------------------- page


def test_the_page_is_made_of_the_results_alone(tmp_path: Path) -> None:
    wanted = [
        result(),
        result(seed=1, metrics={"valid_perplexity": 84.64, "test_perplexity": 81.84}),
        result(row="table1/medium/random", skipped=None, hints_lost=None, notes=["on dense kernels"]),
        result(row="table1/awd-lstm/random", seed=1111, length=15, of=100, full=False, undisturbed=False),
        result(
            row="table3/ner/nr_st", seed=42, length=55, of=60, metrics={"valid_f1": 80.0, "test_f1": 75.5}, dirty=True
        ),
    ]
    written = page.write(saved(tmp_path / "results", *wanted), tmp_path)
    assert [path.name for path in written] == ["results.md", "results-fig3.png"]
    text = written[0].read_text(encoding="utf-8")
    lines = {line.split(" |")[0]: line for line in _section(text, "Zaremba medium") if line.startswith("| NR")}
    assert (
        "83.64 / 80.84 | 1.45 | 84.14 ± 0.71 / 81.34 ± 0.71 | 2 | 39 epochs | 10 | 50.0% | 0 | fp32, cpu |"
        in (lines["| NR+RH+ST"])
    )
    assert "| 86.60 / 83.01 | 1.17 | no run yet |" in lines["| NR+ST"]
    assert "- NR+Random seed 1234: on dense kernels" in _section(text, "Zaremba medium")
    (awd,) = [line for line in _section(text, "AWD-LSTM") if line.startswith("| NR+Random")]
    assert "**shortened: 15 of 100 epochs** | (10) |" in awd
    (ner,) = [line for line in _section(text, "NER (targer)") if line.startswith("| NR+ST")]
    assert "| - / 89.32 | 1.21 | 80.00 / 75.50 | 1 | 55 of 60 epochs, stopped by the host |" in ner
    assert sum("](results/" in line for line in text.splitlines()) == len(wanted)
    assert "0123456789 with changes" in text
    # Named in the notes, not only in the text: all rows of the table.
    assert all(f"## {row.title}\n" in text for row in rows.ROWS)


def _section(text: str, title: str) -> list[str]:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()


def test_shortened_runs_never_share_a_line_with_whole_ones(tmp_path: Path) -> None:
    short = {"length": 2, "full": False, "metrics": {"valid_perplexity": 166.4, "test_perplexity": 163.5}}
    text = page.text(saved(tmp_path, result(), result(seed=2, **short), result(seed=3, **short)), tmp_path / "x.md")
    own = [line for line in _section(text, "Zaremba medium") if line.startswith("| NR+RH+ST")]
    assert len(own) == 2
    assert "| 1 | 39 epochs |" in own[0] and "83.64 / 80.84" in own[0]
    assert "| 2 | **shortened: 2 of 39 epochs** |" in own[1] and "166.40 ± 0.00" in own[1]


def test_the_page_of_no_results_says_so_in_every_row(tmp_path: Path) -> None:
    text = page.text([], tmp_path / "results.md")
    assert text.count("| no run yet |") == len(rows.ROWS)
    assert "No run of table1/medium yet." in text


def test_the_page_in_docs_is_what_the_committed_results_give() -> None:
    path = ROOT / "docs" / page.PAGE
    assert path.read_text(encoding="utf-8") == page.text(list(results.scan(RESULTS / "reproduce")), path)


# ------------------------------------------------------------------------------------------ environment


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone with two commits, the second of which has the script."""
    folder = tmp_path / "clone"
    (folder / "scripts").mkdir(parents=True)
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)

    git("init")
    for name in ("first.py", "reproduce.py"):
        (folder / "scripts" / name).write_text("committed\n")
        git("add", ".")
        git("commit", "-m", name)
    (folder / "scripts" / "reproduce.py").write_text("edited\n")
    return folder


def test_a_commit_is_exported_without_the_edits_of_the_checkout(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[Path] = []
    monkeypatch.setattr(environment, "_install", lambda made, own, say: installed.append(own))
    commit = environment.commit_named(repository, "HEAD")
    made = environment.at_commit(repository, commit, tmp_path / "environments", lambda text: None)
    assert (made.source / "scripts" / "reproduce.py").read_text() == "committed\n"
    assert made.commit == commit and not made.dirty and environment.here(repository).dirty
    assert environment.at_commit(repository, commit, tmp_path / "environments", lambda text: None) == made
    assert len(installed) == 1, "it is made once"
    (repository / "scripts" / "reproduce.py").write_text("committed\n")
    (repository / "docs").mkdir()
    (repository / "docs" / "results.md").write_text("a new result\n")
    assert not environment.here(repository).dirty, "runs take nothing from there"
    before = environment.commit_named(repository, "HEAD~1")
    with pytest.raises(UsageError, match=r"has no scripts/reproduce\.py: name a later one with --commit"):
        environment.at_commit(repository, before, tmp_path / "environments", lambda text: None)
    with pytest.raises(UsageError, match=r"--commit nowhere: .* has no such commit"):
        environment.commit_named(repository, "nowhere")


def test_a_failed_installation_tells_why_and_is_made_anew(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = environment.commit_named(repository, "HEAD")
    failing = [sys.executable, "-c", "print('ERROR: no such wheel'); raise SystemExit(1)"]
    monkeypatch.setattr(environment, "_install", lambda made, own, say: environment._run(failing, own / "install.log"))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"cannot install \(ERROR: no such wheel\); see .*install\.log"):
            environment.at_commit(repository, commit, tmp_path, lambda text: None)
