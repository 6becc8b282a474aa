"""``reproduce.py`` as a program: a run that survives kill -9 and pauses, one queue at a time, refusals in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Without these the script ends at once, and would end pytest.
pytest.importorskip("matplotlib")
pytest.importorskip("platformdirs")
pytest.importorskip("pydantic")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("yaml")
import reproduce
import yaml
from reproduction import asking, dry_run, environment, results, rows, supervision
from reproduction.job import attempts
from reproduction.queueing import State
from reproduction.systems import SYSTEMS
from typer.testing import CliRunner, Result

from ..forks import Forks
from ..patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT.parent / "hosts"
#: Of the tiny rows, and of the shortened run.
EPOCHS, LENGTH = 12, 10

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are held by signals of Linux")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus ``data/tiny``, and a table of rows that train on it: ``tiny/MODE``."""
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(1)
    (folder / "data" / "tiny").mkdir(parents=True)
    for part, lines in (("train", 90), ("valid", 20), ("test", 20)):
        text = "".join(
            " ".join(f"w{(start + 3 * i) % 11}" for i in range(8)) + "\n" for start in rng.choices(range(11), k=lines)
        )
        (folder / "data" / "tiny" / f"{part}.txt").write_text(text)
    config = yaml.safe_load((ROOT / "configs" / "zaremba_medium.yaml").read_text())
    config |= {"hidden_size": 24, "batch_size": 4, "sequence_length": 6, "evaluation_batch_size": 4, "epochs": EPOCHS}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    table = [
        {
            "name": f"tiny/{mode}",
            "title": "Tiny",
            "system": "zaremba",
            "mode": mode,
            "config": str(folder / "tiny.yaml"),
            "data": "tiny",
            "length": EPOCHS,
            "unit": "epochs",
            "seed": 7,
            "metrics": ["valid_perplexity", "test_perplexity"],
        }
        for mode in rows.MODES
    ]
    (folder / "rows.json").write_text(json.dumps(table))
    return folder


@pytest.fixture
def program(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """``reproduce.py`` with the tiny rows, results and state of the test; ends a queue that is left running."""
    monkeypatch.setenv("SD_PLUGIN", "0")
    state = tmp_path / "state"
    places = {"--data": tiny / "data", "--results": tmp_path / "results", "--rows": tiny / "rows.json"}
    taken = {"list": ("--results", "--rows"), "run": tuple(places), "queue": tuple(places)}

    def run(command: str, *arguments: object, status: int = 0) -> Result:
        options = [str(word) for name in taken.get(command, ()) for word in (name, places[name])]
        where = [] if command == "list" else ["--state", str(state)]
        # The test's own come last, and hold.
        words = [command, *options, *where, *map(str, arguments)]
        done = CliRunner().invoke(reproduce.app, words)
        assert done.exit_code == status, (done.output, done.exception)
        return done

    yield run
    worker = State(state).worker()
    if worker is not None:
        os.kill(worker.pid, signal.SIGKILL)


def refused(done: Result) -> str:
    """The one line of a refusal."""
    (line,) = done.stderr.splitlines()
    return line


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What ``condition`` gives as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def epochs(folder: Path) -> int:
    """Epochs that a run has finished."""
    log = folder / "model" / "log.csv"
    return max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_stopped(pid: int) -> bool:
    """Whether a process is held."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def without_times(saved: results.Saved) -> tuple[Any, ...]:
    """What must be equal of two runs of the same training."""
    curve = [{name: value for name, value in point.items() if name != "seconds"} for point in saved.curve]
    result = saved.result
    return curve, result.metrics, result.length, result.full, result.skipped, result.backend


# ------------------------------------------------------------------------------------- runs and the queue


@pytest.mark.slow
def test_a_queue_is_paused_killed_and_continued_to_the_same_result(
    program: Callable[..., Result], tmp_path: Path
) -> None:
    """And a shortened run says that it is one, wherever it appears."""
    row, short = "tiny/random", ["--epochs", LENGTH, "--threads", 1]
    done = program("run", row, *short, "--state", tmp_path / "other state")
    assert "shortened: 10 of 12 epochs" in done.stderr
    whole = results.load(tmp_path / "results" / row / "seed7")
    assert (whole.result.full, whole.result.length, whole.result.of) == (False, LENGTH, EPOCHS)
    assert whole.result.undisturbed and whole.result.skipped is None
    assert whole.result.notes == ["random dropout on this library's dense kernels, not PyTorch's own"]
    (command,) = whole.result.command
    assert command.startswith("python scripts/reproduction/dense_baseline.py ") and "--mode random" in command
    assert "seed 7, shortened: 10 of 12" in " ".join(program("list").stdout.split())
    line = refused(program("run", row, "--epochs", 1, status=2))
    assert line.endswith("holds a result already (shortened: 10 of 12 epochs); --force replaces it")

    again = tmp_path / "again"
    # At normal priority: on a machine that is never idle the test would never end.
    options = ["--here", "--background", "--undisturbed", "--results", again]
    program("queue", row, *short, *options)
    state = State(tmp_path / "state")
    run = state.folder / "runs" / row / f"seed7-{LENGTH}"
    wait_for(lambda: epochs(run), "the first epoch")
    program("pause")
    worker = state.worker()
    assert worker is not None and worker.held
    (child,) = children(worker.pid)
    wait_for(lambda: is_stopped(child), "the program to be held")
    done = epochs(run)
    assert 1 <= done < LENGTH, "paused too late to show anything"
    shown = " ".join(program("status").stdout.split())
    assert "paused" in shown and f"{done} of 10 epochs (shortened)" in shown

    line = refused(program("queue", "tiny/nr_st", "--here", "--background", status=2))
    assert line.startswith("error: a queue is running in") and f"process {worker.pid}" in line
    # Nothing but kill -9 is left to a paused queue whose machine is switched off.
    os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: is_gone(child), "the end of the program with its queue")
    assert "interrupted" in program("status").stdout
    assert epochs(run) == done

    program("continue", "--background")
    wait_for(lambda: epochs(run) > done, "another epoch")
    program("pause")
    program("continue")
    wait_for(lambda: state.worker() is None, "the end of the queue")
    queue = state.load()
    assert queue is not None
    assert [entry.status for entry in queue.entries] == ["done"], state.log.read_text()
    back = results.load(again / row / "seed7")
    assert without_times(back) == without_times(whole)
    assert [since for since, _ in attempts((run / "train.log").read_text())] == [0, done]


def test_a_run_that_fails_is_told_and_the_queue_goes_on(program: Callable[..., Result], tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    state.paused = True
    options = ["--epochs", 1, "--threads", 1]
    program("queue", "tiny/nr_st", "--here", "--background", "--undisturbed", *options)
    assert "--add gives it more rows" in refused(program("queue", "tiny/random", "--here", status=2))
    program("queue", "tiny/nr_rh_st", "--add", *options)
    # Something that zaremba_main.py refuses, and something that this program does.
    runs = state.folder / "runs" / "tiny"
    for folder, name, text in (
        (runs / "nr_st" / "seed7-1" / "model", "log.csv", "of another program\n"),
        (runs / "nr_rh_st" / "seed7-1", "run.json", json.dumps({"identity": {"threads": 8}, "facts": {}})),
    ):
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
    program("continue")
    wait_for(lambda: state.worker() is None, "the end of the queue")
    queue = state.load()
    assert queue is not None
    told = [entry.message for entry in queue.entries if entry.status == "failed"]
    assert "train ended with status 2 (error: model/log.csv is there without its checkpoint" in told[0]
    assert "is of another run: " in told[1] and "threads was 8 and is 1" in told[1]
    assert "nothing is left to do" in program("continue").stderr
    shown = " ".join(program("status").stdout.split())
    assert "failed" in shown and "without its checkpoint" in shown and "1 epochs (shortened)" in shown


def test_an_idle_program_has_the_lowest_priority_and_dies_with_its_supervisor(tmp_path: Path) -> None:
    show = "import os; print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0) == os.SCHED_IDLE)"
    log = tmp_path / "log"
    command = [sys.executable, "-c", show]
    assert supervision.run(command, tmp_path, os.environ, log, True, lambda program: None) == 0
    assert log.read_text().split()[0] == "19"

    # The scheduler of most desktops shares the cores between sessions first.
    if (group := Path("/proc/self/autogroup")).exists() and group.read_text().strip():
        log.unlink()
        command = [sys.executable, "-c", "print(open('/proc/self/autogroup').read())"]
        before = group.read_text()
        assert supervision.run(command, tmp_path, os.environ, log, True, lambda program: None) == 0
        assert log.read_text().split()[-1] == "19"
        assert group.read_text() == before

    def give_up(program: supervision.Program) -> None:
        raise KeyboardInterrupt

    sleeping = [sys.executable, "-c", "import time; print('awake', flush=True); time.sleep(600)"]
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        supervision.run(sleeping, tmp_path, os.environ, log, False, give_up)
    assert time.monotonic() - started < PATIENCE


# ----------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str] | None]:
    """What the programs find wrong with the commands of each row whose host is here; of the others None."""
    folder, commands, last = tmp_path_factory.mktemp("jobs"), {}, None
    patch = pytest.MonkeyPatch()
    for name, variable in (("awd-lstm-lm", "AWD_LSTM_DIR"), ("targer", "TARGER_DIR")):
        if variable not in os.environ and (HOSTS / name).is_dir():
            patch.setenv(variable, str(HOSTS / name))
    queue = asking.empty_queue(environment.here(ROOT), folder, folder, None)
    for entry in asking.Request(threads=1).entries(list(rows.ROWS)):
        job = queue.job(entry, folder)
        # Without pyonmttok, of which Python 3.13 has none, OpenNMT-py's programs are there and do not run.
        runs = job.row.system != "opennmt" or importlib.util.find_spec("pyonmttok") is not None
        if runs and SYSTEMS[job.row.system].problem(job) is None:
            commands[entry.row], last = dry_run.commands_of(job), job
    found: dict[str, list[str] | None] = {row.name: None for row in rows.ROWS}
    if last is not None:
        wrong = [{**those[0], "command": [*those[0]["command"], "--no-such"]} for those in commands.values()]
        told = dry_run.problems_of([one for those in (*commands.values(), wrong) for one in those], last)
        assert sum("--no-such: " in line for line in told) == len(wrong), "an option that no program has is found"
        for row, those in commands.items():
            found[row] = [
                line for line in told if any(line.startswith(f"{' '.join(one['command'])}: ") for one in those)
            ]
    patch.undo()
    return found


@pytest.mark.hosts
@pytest.mark.parametrize("row", [row.name for row in rows.ROWS])
def test_every_rows_commands_are_valid(row: str, problems: dict[str, list[str] | None]) -> None:
    if problems[row] is None:
        pytest.skip("its host is not here")
    assert problems[row] == []


def test_a_dry_run_prints_what_users_type(program: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    # What the programs say is the test before.
    monkeypatch.setattr(dry_run, "problems_of", lambda commands, job: [])
    lines = program("run", "tiny/nr_st", "--dry-run", "--epochs", 2).stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("python scripts/zaremba_main.py ") and lines[0].endswith("--epochs 2")
    monkeypatch.setattr(dry_run, "problems_of", lambda commands, job: ["no such option"])
    assert refused(program("run", "tiny/nr_st", "--dry-run", status=2)) == "error: no such option"


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "tiny/nr"], "unknown row 'tiny/nr'; there are tiny, each with /MODE of random, nr_st, nr_rh_st"),
        (["run", "tiny"], "tiny stands for tiny/random, tiny/nr_st, tiny/nr_rh_st: name one, or use queue"),
        (["run", "tiny/nr_st", "--steps", "3"], "--steps: tiny/nr_st is counted in epochs: give --epochs"),
        (["run", "tiny/nr_st", "--epochs", "31"], "--epochs 31: tiny/nr_st has 12 epochs"),
        (["run", "tiny/nr_st", "--device", "gpu"], "--device gpu: must be cpu, cuda or cuda:N"),
        (["run", "tiny/nr_st", "--device", "cpu:3"], "--device cpu:3: must be cpu, cuda or cuda:N"),
        (["queue", "tiny", "--device", "cuda:x", "--here"], "--device cuda:x: must be cpu, cuda or cuda:N"),
        (["queue", "tiny", "--threads", "100000", "--here"], "--threads 100000: this machine has "),
        (["queue", "tiny", "--add"], "--add: no queue is running in"),
        (["queue", "tiny", "--here", "--commit", "HEAD"], "--here or --commit? The former takes the checkout as it is"),
        (["queue", "tiny", "--commit", "nowhere"], "has no such commit"),
        (["pause"], "there is no queue in"),
        (["continue"], "there is no queue in"),
    ],
)
def test_wrong_use_is_told_in_one_line(program: Callable[..., Result], arguments: list[str], told: str) -> None:
    assert told in refused(program(*arguments, status=2))


def test_what_a_run_said_is_shown_as_it_said_it(program: Callable[..., Result], tmp_path: Path) -> None:
    """Nothing in it is a colour or a picture to the terminal."""
    state, told = State(tmp_path / "state"), "no [bold] :x: in [/nowhere]"
    (row,) = rows.select(["table1/medium/random"], rows.ROWS)
    where = environment.Environment(ROOT, Path(sys.executable), "0" * 40, False)
    queue = asking.empty_queue(where, tmp_path, tmp_path, None)
    (entry,) = asking.Request().entries([row])
    entry.status, entry.message = "failed", told
    queue.entries.append(entry)
    state.save(queue)
    assert told in program("status").output


def test_missing_data_and_hosts_are_named_with_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "empty"))
    for variable in ("AWD_LSTM_DIR", "TARGER_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    text = f"there is no {tmp_path}/ptb/ptb.train.txt: python scripts/get_data.py ptb --out {tmp_path}"
    told = {
        "table1/medium/nr_st": text,
        "table1/awd-lstm/random": "git clone https://github.com/salesforce/awd-lstm-lm DIR",
        "table3/ner/nr_st": "TARGER_DIR=DIR",
    }
    for row, wanted in told.items():
        options = ["--data", str(tmp_path), "--results", str(tmp_path), "--state", str(tmp_path / "state")]
        done = CliRunner().invoke(reproduce.app, ["run", row, *options])
        assert done.exit_code == 2, done.output
        assert wanted in refused(done)
    assert not (tmp_path / "state").exists()


def test_a_page_is_checked_against_the_results(program: Callable[..., Result], tmp_path: Path) -> None:
    places = ["--results", str(tmp_path / "results"), "--out", str(tmp_path)]
    invoke = CliRunner().invoke
    assert "out of date" in refused(invoke(reproduce.app, ["table", "--check", *places]))
    assert invoke(reproduce.app, ["table", *places]).exit_code == 0
    assert invoke(reproduce.app, ["table", "--check", *places]).exit_code == 0
    broken = tmp_path / "results" / "table1" / "medium" / "nr_st" / "seed1"
    broken.mkdir(parents=True)
    (broken / "result.json").write_text("{}")
    done = invoke(reproduce.app, ["table", *places])
    assert done.exit_code == 2 and "is not of schema 1" in refused(done)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Missing command."),
        (["nosuch"], "No such command 'nosuch'."),
        (["run"], "Missing argument 'ROW'."),
        (["run", "table1/medium/random", "--epochs", "0"], "Invalid value for '--epochs': "),
        (["run", "table1/medium/random", "--seed", str(2**32), "--dry-run"], "Invalid value for '--seed': "),
        (["queue", "fig3", "--seed", str(2**32)], "Invalid value for '--seed': "),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(fork: Forks, arguments: list[str], told: str) -> None:
    done = fork(ROOT / "scripts" / "reproduce.py", arguments, cwd=Path.cwd(), env=os.environ)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1, done.stderr


def test_help_shows_a_command_a_line() -> None:
    """They can be copied from there."""
    shown = CliRunner().invoke(reproduce.app, ["--help"]).output
    commands = [line for line in (reproduce.__doc__ or "").splitlines() if "python scripts/" in line]
    assert len(commands) == 7
    assert [line.strip() for line in shown.splitlines() if "python scripts/" in line] == [
        line.strip() for line in commands
    ]
