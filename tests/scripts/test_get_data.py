"""``get_data.py`` as the user runs it: what it prepares, and how it fails without harm."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from corpora import CORPORA, NAMES

from ..more import more


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def ptb_archive(path: Path, **changes: bytes | None) -> Path:
    """An archive with files of ptb's names: of the right size but for ``changes``, and of the wrong text."""
    with tarfile.open(path, "w:gz") as tar:
        for file in CORPORA["ptb"].files:
            content = changes.get(file.output.split(".")[1], bytes(file.size))
            if content is not None:
                entry = tarfile.TarInfo(f"ptb/{file.output}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def existing(get_data) -> dict[str, str]:
    """A folder data/ptb that must survive whatever goes wrong; its digests."""
    folder = get_data.out / "ptb"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("do not touch\n")
    return contents(folder)


class TestUse:
    def test_unknown_name_lists_the_known_ones(self, get_data) -> None:
        line = get_data.fails("pbt", status=2)
        assert "'pbt'" in line
        assert all(name in line for name in NAMES)
        assert get_data.left() == []

    def test_list_names_every_corpus(self, get_data) -> None:
        done = get_data("list")
        assert done.returncode == 0
        assert all(name in done.stdout for name in NAMES)
        assert get_data.left() == []

    def test_help_names_every_corpus_and_its_licence(self, get_data) -> None:
        text = get_data("--help").stdout
        assert all(name in text for name in NAMES)
        assert all(corpus.licence in text for corpus in CORPORA.values())

    def test_source_and_mirror_exclude_each_other(self, get_data) -> None:
        assert "--mirror" in get_data.fails("ptb", "--from", ".", "--mirror", "http://x", status=2)

    @pytest.mark.parametrize(
        ("name", "option", "meant_for"),
        [
            ("demo", ("--from", "."), "multi30k"),
            ("demo", ("--mirror", "http://x"), "multi30k"),
            ("multi30k", ("--seed", 3), "demo"),
            ("multi30k", ("--seed", 1234), "demo"),
            ("ptb", ("--size", 16_000), "demo"),
            ("ptb", ("--sentencepiece", 100), "multi30k"),
            ("ptb", ("--accept-unverified-train",), "iwslt14-de-en"),
            ("demo", ("--accept-unverified-train",), "iwslt14-de-en"),
            ("iwslt14-de-en", ("--mirror", "http://x"), "multi30k"),
            ("list", ("--force",), "ptb"),
        ],
    )
    def test_options_without_effect_are_refused(self, get_data, name: str, option: tuple, meant_for: str) -> None:
        line = get_data.fails(name, *option, status=2)
        assert f"{option[0]} has no effect on {name}" in line
        assert meant_for in line
        assert not get_data.out.exists()

    def test_no_such_source(self, get_data, tmp_path: Path) -> None:
        line = get_data.fails("ptb", "--from", tmp_path / "nowhere", status=2)
        assert f"--from {tmp_path / 'nowhere'}: no such file or folder" in line
        assert not get_data.out.exists()

    @pytest.mark.parametrize(
        ("arguments", "culprit"),
        [
            ((), "NAME"),
            (("demo", "--nonsense"), "--nonsense"),
            (("demo", "--size", "many"), "--size"),
            (("demo", "--sentencepiece", 0), "--sentencepiece"),
            (("demo", "ptb"), "ptb"),
        ],
    )
    def test_a_wrong_command_line_is_told_in_a_line(self, get_data, arguments: tuple, culprit: str) -> None:
        line = get_data.fails(*arguments, status=2)
        assert line.startswith("error: ") and culprit in line
        assert not get_data.out.exists()

    @pytest.mark.parametrize("name", ["ptb", "demo"])
    def test_out_is_a_file(self, get_data, name: str) -> None:
        get_data.out.write_text("")
        assert f"{get_data.out} is not a folder" in get_data.fails(name, status=2)

    def test_what_has_no_verified_origin_is_not_fetched(self, get_data) -> None:
        line = get_data.fails("iwslt14-de-en")
        assert "cannot be fetched" in line
        assert "--from" in line
        assert not get_data.out.exists()


class TestNotInstalled:
    """What a use does not need may be missing."""

    def test_list_and_help_without_num2words(self, get_data, without) -> None:
        environment = without("num2words")
        for arguments in (["list"], ["--help"]):
            done = get_data(*arguments, env=environment)
            assert (done.returncode, done.stderr) == (0, "")
            assert "multi30k" in done.stdout

    def test_other_corpora_without_num2words(self, get_data, without, archive_of) -> None:
        done = get_data("multi30k", "--from", archive_of("multi30k"), env=without("num2words"))
        assert done.returncode == 0, done.stderr
        assert get_data.left() == ["multi30k"]

    def test_other_corpora_fail_for_their_own_reasons(self, get_data, without, tmp_path: Path) -> None:
        line = get_data.fails("multi30k", "--from", tmp_path, env=without("num2words"))
        assert "num2words" not in line
        assert "multi30k.tar.xz" in line

    def test_demo_says_that_it_needs_num2words(self, get_data, without) -> None:
        line = get_data.fails("demo", env=without("num2words"))
        assert line == "get_data: the demo corpus needs num2words: pip install '.[demo]'"
        assert not get_data.out.exists()

    def test_sentencepiece_is_missed_before_anything_is_done(self, get_data, without, server) -> None:
        options = ("--sentencepiece", 60, "--mirror", server.url)
        line = get_data.fails("multi30k", *options, env=without("sentencepiece"))
        assert line == "get_data: --sentencepiece needs sentencepiece: pip install sentencepiece"
        assert not get_data.out.exists()

    @pytest.mark.parametrize("module", ["typer", "rich"])
    def test_what_every_use_needs_is_said_in_a_line(self, get_data, without, module: str) -> None:
        line = get_data.fails("list", status=2, env=without(module))
        assert line == "get_data.py needs typer and rich: pip install '.[demo]'"

    def test_a_wrong_command_line_without_this_package_and_pydantic(self, get_data, without) -> None:
        line = get_data.fails("demo", "--nonsense", status=2, env=without("sd_plugin", "pydantic", "torch"))
        assert line.startswith("error: ") and "--nonsense" in line

    def test_reason_for_skipping_says_how_to_run(self, archive_of, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("SD_PLUGIN_TEST_DATA", str(tmp_path))
        with pytest.raises(pytest.skip.Exception, match=r"set SD_PLUGIN_TEST_DATA to a folder with ptb\.tar\.xz"):
            archive_of("ptb")
        (tmp_path / "ptb.tar.xz").touch()
        assert archive_of("ptb") == tmp_path / "ptb.tar.xz"


class TestFailures:
    """Each: one line that names the culprit, status 1, nothing overwritten, nothing left behind."""

    @pytest.fixture(autouse=True)
    def _unharmed(self, get_data, existing: dict[str, str]):
        yield
        assert contents(get_data.out / "ptb") == existing
        assert [name for name in get_data.left() if not name.endswith(".download")] == ["ptb"]

    def test_folder_of_another_make(self, get_data) -> None:
        assert "--force" in get_data.fails("ptb")

    def test_truncated_archive(self, get_data, tmp_path: Path) -> None:
        path = ptb_archive(tmp_path / "ptb.tar.gz")
        path.write_bytes(path.read_bytes()[:-2000])
        line = get_data.fails("ptb", "--force", "--from", path)
        assert "damaged or truncated" in line
        assert str(path) in line

    def test_no_archive_at_all(self, get_data, tmp_path: Path) -> None:
        (tmp_path / "notes").write_text("hello")
        assert "notes: damaged" in get_data.fails("ptb", "--force", "--from", tmp_path / "notes")

    def test_file_missing_in_the_archive(self, get_data, tmp_path: Path) -> None:
        path = ptb_archive(tmp_path / "ptb.tar.gz", valid=None)
        line = get_data.fails("ptb", "--force", "--from", path)
        assert line == f"get_data: {path} holds no ptb.valid.txt: it is not all of ptb"

    def test_archive_of_another_corpus(self, get_data, tmp_path: Path) -> None:
        path = ptb_archive(tmp_path / "ptb.tar.gz")
        line = get_data.fails("multi30k", "--from", path)
        assert line == f"get_data: {path} holds no tok/train.lc.norm.tok.de: it is not multi30k"
        line = get_data.fails("iwslt14-de-en", "--from", path)
        assert f"{path} holds no train.partial.de: it is not iwslt14-de-en; " in line
        assert "fairseq" in line

    def test_file_missing_in_the_folder(self, get_data, tmp_path: Path) -> None:
        line = get_data.fails("ptb", "--force", "--from", tmp_path)
        assert line == f"get_data: neither ptb.tar.xz nor ptb.train.txt in {tmp_path}"

    def test_wrong_digest_in_an_archive(self, get_data, tmp_path: Path) -> None:
        path = ptb_archive(tmp_path / "ptb.tar.gz")
        line = get_data.fails("ptb", "--force", "--from", tmp_path)
        assert f"{path}: ptb/ptb.train.txt: wrong digest" in line
        assert CORPORA["ptb"].files[0].sha256 in line

    def test_wrong_digest_from_a_mirror(self, get_data, server) -> None:
        server.files = {file.output: bytes(file.size) for file in CORPORA["ptb"].files}
        line = get_data.fails("ptb", "--force", "--mirror", server.url)
        assert "ptb.train.txt: wrong digest" in line
        assert get_data.left() == ["ptb"]

    def test_missing_at_the_mirror(self, get_data, server) -> None:
        assert "404" in get_data.fails("ptb", "--force", "--mirror", server.url)

    def test_no_space(self, get_data, tmp_path: Path) -> None:
        path = ptb_archive(tmp_path / "ptb.tar.gz")
        limit = {
            "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
            # Python would fail to write its own compiled files too.
            "env": {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        }
        line = get_data.fails("ptb", "--force", "--from", path, **limit)
        assert "cannot prepare ptb" in line
        assert "File too large" in line


class TestNothingThere:
    """A run that fails removes the folders that it made, and no others."""

    @pytest.fixture(params=["data", "deep/data"])
    def missing(self, get_data, tmp_path: Path, request):
        get_data.out = tmp_path / request.param
        yield
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("missing")
    def test_source_without_the_corpus(self, get_data) -> None:
        get_data.fails("multi30k", "--from", Path(__file__).parent)

    @pytest.mark.usefixtures("missing")
    def test_nothing_fetched(self, get_data, server) -> None:
        get_data.fails("multi30k", "--mirror", server.url)

    @pytest.mark.usefixtures("missing")
    def test_impossible_size(self, get_data) -> None:
        assert "--size 999999: at most" in get_data.fails("demo", "--size", 999_999)

    def test_an_empty_folder_of_the_user_stays(self, get_data) -> None:
        get_data.out.mkdir()
        get_data.fails("demo", "--size", 0)
        assert get_data.out.is_dir()


def test_out_may_not_be_written(get_data) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    get_data.out.mkdir(mode=0o500)
    assert "Permission denied" in get_data.fails("demo")


#: A corpus that is made in no time.
SMALL = ("demo", "--size", 300)


class TestDemo:
    @pytest.fixture(autouse=True)
    def _num2words(self) -> None:
        pytest.importorskip("num2words")

    def test_is_determined_by_the_seed_and_made_once(self, get_data, tmp_path: Path) -> None:
        assert get_data(*SMALL).returncode == 0
        first = contents(get_data.out / "demo")
        assert sorted(first) == sorted(
            ["README.txt", "manifest.json"]
            + [f"{part}.{side}" for part in ("train", "valid", "test") for side in ("de", "en")]
        )
        assert get_data.left() == ["demo"]
        again = get_data(*SMALL)
        assert (again.returncode, "nothing to do" in again.stderr) == (0, True)
        get_data.out = tmp_path / "other"
        assert get_data(*SMALL).returncode == 0
        assert contents(get_data.out / "demo") == first

        line = get_data.fails(*SMALL, "--seed", 5)
        assert "seed 1234, size 300, not seed 5" in line
        assert "--force" in line
        assert contents(get_data.out / "demo") == first
        assert get_data(*SMALL, "--seed", 5, "--force").returncode == 0
        assert contents(get_data.out / "demo")["test.de"] != first["test.de"]

    def test_test_sentences_are_not_in_training(self, get_data) -> None:
        assert get_data(*SMALL).returncode == 0
        for side in ("de", "en"):
            lines = {
                part: (get_data.out / "demo" / f"{part}.{side}").read_text("utf-8").splitlines()
                for part in ("train", "valid", "test")
            }
            assert not set(lines["train"]) & set(lines["test"])
            assert not set(lines["train"]) & set(lines["valid"])
            manifest = json.loads((get_data.out / "demo" / "manifest.json").read_text())
            assert manifest["files"][f"train.{side}"]["lines"] == len(lines["train"])

    def test_killed_in_the_middle(self, get_data) -> None:
        process = subprocess.Popen(get_data.command("demo"), stderr=subprocess.DEVNULL)
        staged = get_data.out / ".demo.staging" / "demo" / "train.de"
        while not staged.exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert get_data.left() == [".demo.staging"]
        assert get_data(*SMALL).returncode == 0
        assert get_data.left() == ["demo"]
        assert "nothing to do" in get_data(*SMALL).stderr

    def test_two_runs_take_turns(self, get_data) -> None:
        get_data.out.mkdir()
        held = os.open(get_data.out, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        with subprocess.Popen(get_data.command(*SMALL), stderr=subprocess.PIPE, text=True) as process:
            assert "waiting for another run" in process.stderr.readline()
            assert get_data.left() == []
            os.close(held)
            assert "is ready" in process.stderr.read()
        assert process.returncode == 0


class TestLinks:
    """Where what the script works on is a link: the link is replaced, and what it leads to is let alone."""

    @pytest.fixture(autouse=True)
    def _num2words(self) -> None:
        pytest.importorskip("num2words")

    @pytest.mark.parametrize("place", ["demo", *more(".demo.staging", ".demo.replaced")])
    @pytest.mark.parametrize("dangling", [False, True])
    def test_a_link_is_replaced(self, get_data, tmp_path: Path, place: str, dangling: bool) -> None:
        target = tmp_path / "target"
        if not dangling:
            target.mkdir()
            (target / "mine.txt").write_text("do not touch\n")
        get_data.out.mkdir()
        (get_data.out / place).symlink_to(target)
        if place != ".demo.staging":
            assert "--force replaces it" in get_data.fails(*SMALL)
        done = get_data(*SMALL, "--force")
        assert done.returncode == 0, done.stderr
        assert get_data.left() == ["demo"]
        assert not (get_data.out / "demo").is_symlink()
        assert "nothing to do" in get_data(*SMALL).stderr
        assert [path.name for path in target.glob("*")] == ([] if dangling else ["mine.txt"])

    def test_a_prepared_folder_that_was_moved_away_is_complete(self, get_data, tmp_path: Path) -> None:
        assert get_data(*SMALL).returncode == 0
        (get_data.out / "demo").rename(tmp_path / "larger disk")
        (get_data.out / "demo").symlink_to(tmp_path / "larger disk")
        assert "nothing to do" in get_data(*SMALL).stderr
        assert (get_data.out / "demo").is_symlink()

    @pytest.mark.parametrize("dangling", [False, True])
    def test_a_download_may_be_elsewhere(self, get_data, server, tmp_path: Path, dangling: bool) -> None:
        get_data.out.mkdir()
        if not dangling:
            (tmp_path / "target").mkdir()
        (get_data.out / ".ptb.download").symlink_to(tmp_path / "target")
        assert "404" in get_data.fails("ptb", "--mirror", server.url)
        assert get_data.left() == []

    def test_a_file_in_the_place_of_a_working_folder(self, get_data) -> None:
        get_data.out.mkdir()
        (get_data.out / ".demo.staging").touch()
        assert get_data(*SMALL).returncode == 0
        assert get_data.left() == ["demo"]


class TestSentencepiece:
    """--sentencepiece on a corpus that is there, intact or not, and on one that is not."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("num2words")
        pytest.importorskip("sentencepiece")

    @pytest.fixture
    def model(self, get_data) -> Path:
        assert get_data(*SMALL, "--sentencepiece", 60).returncode == 0
        return get_data.out / "demo" / "spm.model"

    def test_is_trained_once(self, get_data) -> None:
        assert get_data(*SMALL, "--sentencepiece", 60).returncode == 0
        assert get_data.left() == ["demo"]
        again = get_data(*SMALL, "--sentencepiece", 60)
        assert (again.returncode, "is there, nothing to do" in again.stderr) == (0, True)
        refused = get_data(*SMALL, "--sentencepiece", 50)
        assert refused.returncode == 1
        assert "has 60 pieces, not 50" in refused.stderr

    def test_force_replaces_only_the_model(self, get_data, model: Path) -> None:
        text, old = model.with_name("train.de").stat(), model.read_bytes()
        done = get_data(*SMALL, "--sentencepiece", 50, "--force")
        assert done.returncode == 0, done.stderr
        assert model.read_bytes() != old
        # The very same file, not one of equal text made again.
        assert model.with_name("train.de").stat() == text
        assert get_data.left() == ["demo"]

    def test_force_fetches_nothing_for_it(self, get_data, archive_of, server) -> None:
        assert get_data("multi30k", "--from", archive_of("multi30k")).returncode == 0
        done = get_data("multi30k", "--mirror", server.url, "--sentencepiece", 200, "--force")
        assert done.returncode == 0, done.stderr
        assert server.asked == []
        assert (get_data.out / "multi30k" / "spm.model").exists()

    def test_force_replaces_a_changed_corpus_too(self, get_data, model: Path) -> None:
        before = get_data.contents()
        model.with_name("train.de").write_text("changed\n")
        assert "was changed" in get_data.fails(*SMALL, "--sentencepiece", 60)
        assert get_data(*SMALL, "--sentencepiece", 60, "--force").returncode == 0
        assert get_data.contents() == before

    @pytest.mark.parametrize("changed", [False, True])
    def test_failed_training_changes_nothing(self, get_data, model: Path, changed: bool) -> None:
        if changed:
            model.with_name("train.de").write_text("changed\n")
        before = get_data.contents()
        line = get_data.fails(*SMALL, "--sentencepiece", 9999, "--force")
        assert line.startswith("get_data: --sentencepiece 9999: ")
        assert "<=" in line
        assert get_data.contents() == before
        assert get_data.left() == ["demo"]

    def test_failed_training_of_a_new_corpus_leaves_nothing(self, get_data) -> None:
        get_data.fails(*SMALL, "--sentencepiece", 9999)
        assert not get_data.out.exists()


class TestRealText:
    """With the texts that may not be shipped."""

    @pytest.mark.parametrize("name", CORPORA)
    def test_from_an_archive(self, get_data, archive_of, name: str) -> None:
        done = get_data(name, "--from", archive_of(name).parent)
        assert done.returncode == 0, done.stderr
        assert get_data.left() == [name]
        corpus = CORPORA[name]
        found = contents(get_data.out / name)
        changed = [file.output for file in corpus.files if found[file.output] != file.sha256]
        # One line of Multi30k has two spaces in a row.
        assert changed == (["train.en"] if name == "multi30k" else [])
        readme = (get_data.out / name / "README.txt").read_text()
        assert corpus.licence in readme
        assert ("PARTIAL" in readme) == ("partial" in done.stderr) == (name == "iwslt14-de-en")
        assert "nothing to do" in get_data(name).stderr
        # A wrong path is a mistake even where it is not needed.
        assert "nowhere: no such file" in get_data.fails(name, "--from", "nowhere", status=2)

    def test_from_raw_files_and_from_what_the_origin_serves(self, get_data, archive_of, tmp_path: Path) -> None:
        with tarfile.open(archive_of("conll2003")) as tar:
            tar.extractall(tmp_path / "raw", filter="data")
        for file in CORPORA["conll2003"].files:
            path = tmp_path / "raw" / "conll2003" / file.output
            path.write_bytes(path.read_bytes()[:-2])
            path.rename(path.with_name(file.origin.name))
        assert get_data("conll2003", "--from", tmp_path / "raw").returncode == 0
        found = contents(get_data.out / "conll2003")
        assert all(found[file.output] == file.sha256 for file in CORPORA["conll2003"].files)

    def test_download_killed_and_continued(self, get_data, archive_of, server) -> None:
        with tarfile.open(archive_of("ptb")) as tar:
            for file in CORPORA["ptb"].files:
                server.files[file.output] = tar.extractfile(f"ptb/{file.output}").read()
        server.pause, server.piece = 0.05, 1 << 18
        process = subprocess.Popen(get_data.command("ptb", "--mirror", server.url), stderr=subprocess.DEVNULL)
        part = get_data.out / ".ptb.download" / "ptb.train.txt.part"
        while not (part.exists() and part.stat().st_size > 1 << 18):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ".ptb.staging" in get_data.left()
        assert "ptb" not in get_data.left()
        server.pause, server.cuts = 0, [1 << 18]
        got = part.stat().st_size
        done = get_data("ptb", "--mirror", server.url)
        assert done.returncode == 0, done.stderr
        assert server.asked[1:3] == [f"ptb.train.txt from {got}", f"ptb.train.txt from {got + (1 << 18)}"]
        assert get_data.left() == ["ptb"]
        found = contents(get_data.out / "ptb")
        assert all(found[file.output] == file.sha256 for file in CORPORA["ptb"].files)

    def test_all_of_iwslt14_only_on_request_and_labelled(self, get_data, archive_of, tmp_path: Path) -> None:
        with tarfile.open(archive_of("iwslt14-de-en")) as tar:
            tar.extractall(tmp_path, filter="data")
        raw = tmp_path / "iwslt14-de-en"
        shutil.rmtree(raw / "sets")
        for side in ("de", "en"):
            (raw / f"train.partial.{side}").unlink()
            (raw / f"train.{side}").write_text("x\n" * 160_239)
        assert "train.partial.de" in get_data.fails("iwslt14-de-en", "--from", raw)
        done = get_data("iwslt14-de-en", "--from", raw, "--accept-unverified-train")
        assert done.returncode == 0, done.stderr
        assert "NOT VERIFIED" in (get_data.out / "iwslt14-de-en" / "README.txt").read_text()
        (raw / "train.en").write_text("x\n" * 160_238)
        line = get_data.fails("iwslt14-de-en", "--from", raw, "--accept-unverified-train", "--force")
        assert "160,238 lines instead of 160,239" in line
