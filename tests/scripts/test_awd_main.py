"""``awd_main.py``: the programs of a stand-in of awd-lstm-lm, run one after the other, and what stops them.

The host itself is run in tests/hosts/test_awd_lstm.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from ..environ import clean
from ..forks import Forks
from ..patience import PATIENCE

# Without it the script ends at once, and would end pytest.
pytest.importorskip("pydantic")
import awd_main
import host_launcher

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests" / "patches" / "standins" / "awd_lstm"
LAUNCHER = ROOT / "scripts" / "awd_main.py"
REPORT = "sd-plugin: structured dropout report"
#: So small, and with so large a learning rate, that main.py gets through SGD and its average.
SMALL = ("--cuda", "--epochs", "6", "--nonmono", "1", "--lr", "40")

Done = subprocess.CompletedProcess[str]


def environ(**changes: str) -> dict[str, str]:
    """The environment variables of the tests, without those that concern the plugin or Python."""
    kept = clean("AWD_LSTM", "PYTHON", "COV_")
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def launch(*arguments: object, cwd: Path, **changes: str) -> Done:
    """Run the launcher in a Python of its own."""
    command = [sys.executable, str(LAUNCHER), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, env=environ(**changes), check=False
    )


@pytest.fixture(scope="module")
def run(fork: Forks) -> Callable[..., Done]:
    """Runs the launcher, or another program, in a fork."""

    def run(*arguments: object, cwd: Path, status: int = 0, program: Path = LAUNCHER, **changes: str) -> Done:
        done = fork(program, arguments, cwd=cwd, env=environ(**changes))
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


def write_corpus(folder: Path, prefix: str = "") -> Path:
    """A small text, the same every time."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for part, lines in (("train", 60), ("valid", 16), ("test", 8)):
        text = "".join(" ".join(rng.choice(list("abcdefgh"), 6)) + "\n" for _ in range(lines))
        (folder / f"{prefix}{part}.txt").write_text(text)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with a corpus where the host looks for it."""
    write_corpus(tmp_path / "work" / "data" / "penn")
    return tmp_path / "work"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of one's own, to change."""
    return Path(shutil.copytree(STANDIN, tmp_path / "checkout", ignore=shutil.ignore_patterns("__pycache__")))


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:valid|test|val) loss ([\d.]+)", text)]


def rows(report: str) -> dict[str, list[str]]:
    """The rows of the report, by place."""
    lines = report[report.index(REPORT) :].splitlines()[2:]
    # The sums and explanations come after them.
    ends = next(number for number, line in enumerate(lines) if "multiply-adds of these products skipped" in line)
    return {line.split()[0]: line.split()[1:] for line in lines[:ends]}


@dataclass
class Chain:
    """All programs, each with what the one before has left.

    Attributes:
        mode: of ``--sd``; None without it.
        done: what each run printed; models: what it left in its checkpoint.
    """

    mode: str | None
    folder: Path
    done: dict[str, Done] = field(default_factory=dict)
    models: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def chains(run: Callable[..., Done], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Chain]:
    steps: dict[str, list[object]] = {
        "main": [*SMALL, "--save", "model.pt"],
        "resume": ["--cuda", "--epochs", 1, "--lr", 1, "--resume", "model.pt", "--save", "resumed.pt"],
        "finetune": ["--script", "finetune", "--cuda", "--epochs", 2, "--lr", 1, "--save", "model.pt"],
        "generate": ["--script", "generate", "--checkpoint", "model.pt", "--words", 20],
        "pointer": ["--script=pointer", "--cuda", "--save", "model.pt"],
    }
    made: dict[str | None, Chain] = {}
    for mode, sd in ((None, []), ("nr_rh_st", ["--sd"])):
        made[mode] = Chain(mode, tmp_path_factory.mktemp("chain"))
        write_corpus(made[mode].folder / "data" / "penn")
        for name, arguments in steps.items():
            made[mode].done[name] = run("--awd-dir", STANDIN, *sd, *arguments, cwd=made[mode].folder)
            made[mode].models[name] = (made[mode].folder / "model.pt").read_bytes()
    return made


@pytest.fixture(params=[None, "nr_rh_st"], ids=["random", "nr_rh_st"])
def chain(request: pytest.FixtureRequest, chains: dict[str | None, Chain]) -> Chain:
    return chains[request.param]


def test_the_host_trains_by_sgd_and_then_its_average(chain: Chain) -> None:
    printed = chain.done["main"].stdout
    for line in ("Producing dataset...", "Switching to ASGD", "Saving Averaged!", "| End of training"):
        assert line in printed
    assert all(0.5 < loss < 10 for loss in losses(printed))
    assert losses(printed)[-1] < losses(printed)[0]


def test_a_run_is_resumed(chain: Chain) -> None:
    printed = chain.done["resume"].stdout
    assert "Loading cached dataset..." in printed
    assert "Resuming model ..." in printed
    # Untrained, a word of nine costs log 9 = 2.2 and more.
    assert losses(printed)[0] < losses(chain.done["main"].stdout)[0]
    assert (chain.folder / "resumed.pt").is_file()
    assert chain.models["resume"] == chain.models["main"], "what it started from is left alone"


def test_the_programs_beside_main_run_to_their_end(chain: Chain) -> None:
    fine = losses(chain.done["finetune"].stdout)
    assert len(fine) == 3
    assert fine[0] < 2.4
    assert "| Generated" in chain.done["generate"].stdout
    words = (chain.folder / "generated.txt").read_text().split()
    assert len(words) == 20
    assert set(words) <= {*"abcdefgh", "<eos>"}
    assert len(set(words)) > 2
    (pointed,) = losses(chain.done["pointer"].stdout)
    assert pointed < 2.4


def test_finetuning_saves_a_model_that_is_better(chain: Chain) -> None:
    better = "Saving Averaged!" in chain.done["finetune"].stdout
    assert (chain.models["finetune"] != chain.models["main"]) is better
    assert chain.models["pointer"] == chain.models["generate"] == chain.models["finetune"]


def test_counters_are_reported_where_structured_dropout_was_asked_for(chain: Chain) -> None:
    for name, done in chain.done.items():
        if chain.mode is None or name in ("generate", "pointer"):
            assert done.stderr == "", name
            continue
        found = rows(done.stderr)
        assert set(found) == {"embedding", "rnns.0.l0.recurrent", "rnns.1.input", "rnns.1.l0.recurrent", "output"}
        for place, (_, dropped, skipped, waived, lost) in found.items():
            assert (waived, lost) == ("0", "0"), place
            assert dropped == skipped != "0.0%", place


def test_nothing_but_what_was_asked_for_is_left(chain: Chain) -> None:
    (cache,) = chain.folder.glob("corpus.*.data")
    left = {path.name for path in chain.folder.iterdir()}
    assert left == {"data", "model.pt", "resumed.pt", "generated.txt", cache.name}


def test_one_flag_is_the_difference(chains: dict[str | None, Chain]) -> None:
    """The same settings are told, of the same corpus, and other units are dropped."""
    told = [re.findall("^Args: .*", made.done["main"].stdout, re.MULTILINE) for made in chains.values()]
    assert told[0] == told[1] != []
    found = [losses(made.done["main"].stdout) for made in chains.values()]
    assert len(found[0]) == len(found[1]) == 7
    assert found[0] != found[1]


def test_the_environment_does_not_change_a_run_without_the_flag(chains: dict[str | None, Chain], work: Path) -> None:
    # A Python of its own, in which the start-up hook is at work.
    done = launch("--awd-dir", STANDIN, *SMALL, "--save", "model.pt", cwd=work, SD_PLUGIN="1", SD_PLUGIN_CASE="IV")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == chains[None].done["main"].stdout


def test_the_host_alone_fails_in_its_second_epoch(work: Path, run: Callable[..., Done]) -> None:
    """What the launcher puts right even without the flag."""
    done = run("--cuda", "--save", "model.pt", cwd=work, status=1, program=STANDIN / "main.py")
    assert "end of epoch 1" in done.stdout
    assert "as parameter 'weight_hh_l0'" in done.stderr


def test_a_corpus_of_get_data_and_another_mode(tmp_path: Path, run: Callable[..., Done]) -> None:
    """Files under the names that scripts/get_data.py gives them; ``nr_st``; and no report."""
    write_corpus(tmp_path / "data" / "ptb", "ptb.")
    before = sorted(os.listdir(tmp_path / "data" / "ptb"))
    # The reference needs no compiler, so the empty cache folder costs nothing.
    changes = {"SD_PLUGIN_CACHE": str(tmp_path / "cache"), "SD_PLUGIN_BACKEND": "reference"}
    arguments = ("--awd-dir", STANDIN, "--sd=nr_st", "--sd-case", "IV", "--cuda", "--epochs", 1, "--save", "model.pt")
    done = run(*arguments, "--data", "data/ptb", cwd=tmp_path, SD_PLUGIN_REPORT="0", **changes)
    assert "Producing dataset..." in done.stdout
    assert done.stderr == ""
    assert sorted(os.listdir(tmp_path / "data" / "ptb")) == before
    done = run(*arguments, cwd=tmp_path, **changes)
    assert "Loading cached dataset..." in done.stdout, "data/ptb without being named, and always under the same name"
    assert set(rows(done.stderr)) == {"embedding", "rnns.1.input", "output"}


def test_a_dry_run_prints_what_would_be_patched_and_changes_nothing(tmp_path: Path, run: Callable[..., Done]) -> None:
    for arguments, told in (
        (["--sd"], "mode nr_rh_st. Would be patched:"),
        (["--script", "pointer"], "mode random, the host's own dropout. Would be patched:"),
    ):
        done = run("--awd-dir", STANDIN, "--sd-dry-run", *arguments, "--data", "none", cwd=tmp_path)
        first, *changes = done.stdout.splitlines()
        assert first.startswith(f"awd-lstm-lm in {STANDIN}, commit ")
        assert first.endswith(told)
        assert "  torch.load" in changes
        assert ("  locked_dropout.LockedDropout.forward" in changes) is ("--sd" in "".join(arguments))
        assert ("  utils.get_batch" in changes) is ("pointer" in arguments)
        assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_arguments_and_exit_status_are_the_programs_own(checkout: Path, work: Path, run: Callable[..., Done]) -> None:
    code = "import sys, utils\nprint(__name__, __file__, *sys.argv, utils.__file__, sep='|')\nsys.exit(7)\n"
    (checkout / "main.py").write_text(code)
    own = ["--when", "2", "3", "--lr=0.1", "--save", "a b.pt", "--frobnicate"]
    done = run("--sd", "--awd-dir", checkout, *own, "--cuda", cwd=work, status=7)
    program = str(checkout / "main.py")
    expected = ["__main__", program, program, *own, "--cuda", "--data", "data/penn", str(checkout / "utils.py")]
    assert done.stdout.strip().split("|") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_host_is_told_so(work: Path, run: Callable[..., Done]) -> None:
    done = run("--awd-dir", STANDIN, "--epochs", 1, "--wdrop", 0, "--save", "model.pt", cwd=work)
    assert done.stderr == "awd_main.py: no GPU here: adding --cuda, which is how this host is told not to use one\n"
    assert "cuda=False" in done.stdout


# Wrong use: one line, status 2, and before anything is done.


def refused(*arguments: object, cwd: Path, **changes: str) -> str:
    """What the launcher says, in this process: nothing of the host runs."""
    before, here = sorted(cwd.rglob("*")), Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environ(**changes), clear=True),
        mock.patch.object(sys, "argv", [str(LAUNCHER), *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.chdir(cwd)
        try:
            status = host_launcher.told_in_one_line(awd_main.main)
        finally:
            os.chdir(here)
    assert status == 2, err.getvalue()
    assert out.getvalue() == ""
    (line,) = err.getvalue().splitlines()
    assert line.startswith("error: ")
    assert sorted(cwd.rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sd=nr"], "--sd must be one of random, nr_st, nr_rh_st, got 'nr'"),
        (["--sd="], "--sd must be one of random, nr_st, nr_rh_st, got ''"),
        (["--sd", "--sd-case", "V"], "--sd-case must be one of I, II, III, IV, got 'V'"),
        (["--dat", "mine"], "--dat: write --data in full"),
        (["--script", "train"], "--script must be one of main, finetune, generate, pointer, got 'train'"),
        (["--data", "nowhere"], "no training data: looked in nowhere; python scripts/get_data.py ptb makes data/ptb"),
        (["--data"], "--data needs a value"),
        (["--resume", "none.pt"], "--resume: there is no none.pt"),
        (["--save", "none/model.pt"], "work/none is no folder to write in"),
        (["--script", "finetune"], "none was named: give --save FILE"),
        (["--script", "finetune", "--save", "none.pt"], "there is no none.pt: give --save FILE"),
        (["--script", "generate"], "there is no model.pt: give --checkpoint FILE"),
        (["--script", "generate", "--checkpoint", "none.pt"], "there is no none.pt: give --checkpoint FILE"),
        (["--script", "pointer"], "there is no best.pt: give --save FILE"),
        (["--script", "generate", "--checkpoint", "data/penn/test.txt", "--outf", "none/x"], "none is no folder to"),
        # What the host would run into later, or never come out of.
        (["--batch_size", "0"], "--batch_size must be a whole number from 1 to 2**63 - 1, got '0'"),
        (["--batch", "-3"], "--batch_size must be a whole number from 1 to 2**63 - 1, got '-3'"),
        (["--batch_size", "1000"], "data/penn/train.txt has too few words to be read in 1000 columns"),
        (["--batch_size", "1000000000"], "data/penn/train.txt has too few words to be read in 1000000000 columns"),
        # After its last epoch the host loads what the best one has saved.
        (["--epochs=0"], "--epochs must be a whole number from 1 to 2**63 - 1, got '0'"),
        (["--bptt=0"], "--bptt must be a whole number from 1 to 2**63 - 1, got '0'"),
        (["--script=pointer", "--bptt=0"], "--bptt must be a whole number from 1 to 2**63 - 1, got '0'"),
        (["--emsize", "9" * 5000], "--emsize must be a whole number from 1 to 2**63 - 1, got '999"),
        (
            ["--nhid", "1000000000"],
            "--emsize 400 --nhid 1000000000 --nlayers 3 needs 8.94e+10 GiB, and this",
        ),
        (["--dropouth", "1"], "--dropouth must be a finite number of at least 0 and below 1, got '1'"),
        (["--wdrop", "nan"], "--wdrop must be a finite number from 0 to 1, got 'nan'"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 2**32 - 1, got '-1'"),
        (["--clip=-1"], "--clip must be a finite number of at least 0, got '-1'"),
        (["--log-interval=0"], "--log-interval must be a whole number from 1 to 2**63 - 1, got '0'"),
        (["--optimizer=none"], "--optimizer must be one of sgd, adam, got 'none'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--sd-case"], "argument --sd-case: expected one argument"),
    ],
)
def test_wrong_use(work: Path, arguments: list[str], told: str) -> None:
    assert told in refused("--awd-dir", STANDIN, "--cuda", *arguments, cwd=work)


@pytest.mark.parametrize("arguments", [["--sd-dry-run"], ["--cuda"]])
def test_numpy_is_needed(work: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    said = refused("--awd-dir", STANDIN, *arguments, cwd=work)
    assert said == "error: numpy is not installed, which the original needs"


@pytest.mark.parametrize("script", ["awd_main", "ner_main"])
@pytest.mark.parametrize("module", ["pydantic", "sd_plugin"])
def test_what_it_needs_is_said_in_a_line(without, script: str, module: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**without(module), "PYTHONHASHSEED": "0"}
    )
    assert done.returncode == 2
    assert done.stderr == f"{script}.py needs sd-plugin and pydantic: pip install '.[demo]'\n"


def test_a_folder_in_the_place_of_the_checkpoint(work: Path) -> None:
    (work / "model.pt").mkdir()
    assert "model.pt" in refused("--awd-dir", STANDIN, "--cuda", "--epochs", 1, "--save", "model.pt", cwd=work)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(work: Path) -> None:
    (work / "kept").mkdir(mode=0o555)
    assert "kept is no folder to write in" in refused("--awd-dir", STANDIN, "--save", "kept/model.pt", cwd=work)


def test_a_folder_that_is_not_the_host(work: Path, checkout: Path) -> None:
    assert "data is not a checkout of awd-lstm-lm: it has no weight_drop.py" in refused("--awd-dir", "data", cwd=work)
    assert "none is not a folder" in refused("--awd-dir", "none", cwd=work)
    (checkout / "model.py").write_text("class RNNModel:\n    pass\n")
    line = refused("--awd-dir", checkout, cwd=work)
    assert line.endswith("model.py is not that of awd-lstm-lm: it has no RNNModel.__init__")


def test_a_program_that_is_not_there(work: Path, checkout: Path) -> None:
    (checkout / "pointer.py").unlink()
    assert refused("--awd-dir", checkout, "--script", "pointer", cwd=work) == f"error: {checkout} has no pointer.py"


def test_the_variable_names_the_checkout(work: Path, tmp_path: Path) -> None:
    assert f"{tmp_path} is not a checkout of awd-lstm-lm" in refused(cwd=work, AWD_LSTM_DIR=str(tmp_path))


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("", "valid.txt"),
        ("ptb.", "ptb.valid.txt"),
    ],
)
def test_a_corpus_that_is_not_complete(tmp_path: Path, prefix: str, shown: str) -> None:
    folder = write_corpus(tmp_path / "text", prefix)
    given = ("--awd-dir", STANDIN, "--data", "text")
    changes = {"SD_PLUGIN_CACHE": str(tmp_path / "cache")}
    (folder / shown).write_text("")
    assert refused(*given, cwd=tmp_path, **changes).endswith(f"{shown} is empty")
    (folder / shown).unlink()
    assert "no training data in text: neither valid.txt nor ptb.valid.txt is there" in refused(
        *given, cwd=tmp_path, **changes
    )


# What is on the disk already.


def test_a_damaged_cache_of_the_corpus_is_told_and_left(
    chains: dict[str | None, Chain], work: Path, run: Callable[..., Done]
) -> None:
    (whole,) = chains[None].folder.glob("corpus.*.data")
    content = whole.read_bytes()[:-100]
    (work / whole.name).write_bytes(content)
    done = run("--awd-dir", STANDIN, "--cuda", cwd=work, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {whole.name} is damaged, or no file of awd-lstm-lm: ")
    assert (work / whole.name).read_bytes() == content


@pytest.mark.parametrize("script", ["main", "generate"])
def test_a_damaged_checkpoint_is_told_and_left(
    chains: dict[str | None, Chain], work: Path, run: Callable[..., Done], script: str
) -> None:
    content = chains[None].models["main"][:-100]
    (work / "model.pt").write_bytes(content)
    options = ["--resume", "model.pt", "--cuda"] if script == "main" else ["--checkpoint", "model.pt"]
    done = run("--awd-dir", STANDIN, "--script", script, *options, cwd=work, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model.pt is damaged, or no file of awd-lstm-lm: ")
    assert (work / "model.pt").read_bytes() == content


def test_a_save_that_is_killed_leaves_the_former_checkpoint(
    chains: dict[str | None, Chain], checkout: Path, work: Path, run: Callable[..., Done]
) -> None:
    (work / "model.pt").write_bytes(chains[None].models["main"])
    slow = """
def _slowly(self):
    print("saving", flush=True)
    __import__("time").sleep(60)

SplitCrossEntropyLoss.__getstate__ = _slowly
"""
    with (checkout / "splitcross.py").open("a") as file:
        file.write(slow)
    arguments = ("--awd-dir", str(checkout), "--cuda", "--epochs", "1", "--save", "model.pt")
    command = [sys.executable, str(LAUNCHER), *arguments]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True, env=environ()) as process:
        assert process.stdout
        assert "saving\n" in iter(process.stdout.readline, "")
        process.kill()
    assert (work / "model.pt").read_bytes() == chains[None].models["main"]
    resumed = run("--awd-dir", STANDIN, "--cuda", "--epochs", 1, "--resume", "model.pt", "--save", "a.pt", cwd=work)
    assert "| End of training" in resumed.stdout


@pytest.fixture
def text_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """``host_launcher.text_folder`` for the names of this host, with a cache folder of its own."""
    monkeypatch.setenv("SD_PLUGIN_CACHE", str(tmp_path / "cache"))
    return lambda folder: host_launcher.text_folder(folder, awd_main.CORPUS)


def test_a_corpus_under_the_hosts_names_is_used_as_it_is(text_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text")
    assert text_folder(folder) == folder
    assert not (tmp_path / "cache").exists()


def test_a_corpus_under_other_names_is_linked_to(text_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text", "ptb.")
    links = text_folder(folder)
    assert {path.name: path.read_bytes() for path in links.iterdir()} == {
        f"{part}.txt": (folder / f"ptb.{part}.txt").read_bytes() for part in ("train", "valid", "test")
    }
    assert text_folder(folder) == text_folder(folder / ".." / "text") == links, "always the same one"
    assert len(list(links.iterdir())) == 3
    other = write_corpus(tmp_path / "other", "ptb.")
    assert text_folder(other) != links
    (folder / "ptb.valid.txt").write_text("changed\n")
    assert (text_folder(folder) / "valid.txt").read_text() == "changed\n"
