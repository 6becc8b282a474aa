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

pytest.importorskip("num2words")


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

    def test_unverified_text_only_where_there_is_some(self, get_data) -> None:
        line = get_data.fails("ptb", "--accept-unverified-train", "--from", ".")
        assert "iwslt14-de-en" in line

    def test_what_has_no_verified_origin_is_not_fetched(self, get_data) -> None:
        line = get_data.fails("iwslt14-de-en")
        assert "cannot be fetched" in line
        assert "--from" in line
        assert get_data.left() == []


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
        assert "ptb.valid.txt" in get_data.fails("ptb", "--force", "--from", path)

    def test_file_missing_in_the_folder(self, get_data, tmp_path: Path) -> None:
        line = get_data.fails("ptb", "--force", "--from", tmp_path)
        assert "ptb.train.txt" in line
        assert str(tmp_path) in line

    def test_no_such_source(self, get_data, tmp_path: Path) -> None:
        assert "nowhere: no such file" in get_data.fails("ptb", "--force", "--from", tmp_path / "nowhere")

    def test_wrong_digest_in_an_archive(self, get_data, tmp_path: Path) -> None:
        ptb_archive(tmp_path / "ptb.tar.gz")
        line = get_data.fails("ptb", "--force", "--from", tmp_path)
        assert "ptb.train.txt: wrong digest" in line
        assert CORPORA["ptb"].files[0].sha256 in line

    def test_wrong_digest_from_a_mirror(self, get_data, server) -> None:
        server.files = {file.output: bytes(file.size) for file in CORPORA["ptb"].files}
        line = get_data.fails("ptb", "--force", "--mirror", server.url)
        assert "ptb.train.txt: wrong digest" in line
        assert list((get_data.out / ".ptb.download").iterdir()) == []

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


def test_out_is_a_file(get_data) -> None:
    get_data.out.write_text("")
    assert str(get_data.out) in get_data.fails("demo")


def test_out_may_not_be_written(get_data) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    get_data.out.mkdir(mode=0o500)
    assert "Permission denied" in get_data.fails("demo")


#: A corpus that is made in no time.
SMALL = ("demo", "--size", 300)


class TestDemo:
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

    def test_impossible_size(self, get_data) -> None:
        assert "--size 999999: at most" in get_data.fails("demo", "--size", 999_999)
        assert get_data.left() == []

    def test_sentencepiece(self, get_data) -> None:
        pytest.importorskip("sentencepiece")
        assert get_data(*SMALL, "--sentencepiece", 60).returncode == 0
        model = (get_data.out / "demo" / "spm.model").read_bytes()
        assert get_data.left() == ["demo"]
        again = get_data(*SMALL, "--sentencepiece", 60)
        assert (again.returncode, "is there, nothing to do" in again.stderr) == (0, True)
        refused = get_data(*SMALL, "--sentencepiece", 50)
        assert refused.returncode == 1
        assert "has 60 pieces, not 50" in refused.stderr
        impossible = get_data(*SMALL, "--sentencepiece", 9999, "--force")
        assert impossible.returncode == 1
        assert "--sentencepiece 9999: " in impossible.stderr
        assert "<=" in impossible.stderr
        assert get_data(*SMALL, "--sentencepiece", 60).returncode == 0
        assert (get_data.out / "demo" / "spm.model").read_bytes() == model


class TestRealText:
    """With the texts that may not be shipped."""

    @pytest.mark.parametrize("name", CORPORA)
    def test_from_an_archive(self, get_data, shared: Path, name: str) -> None:
        done = get_data(name, "--from", shared)
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

    def test_from_raw_files_and_from_what_the_origin_serves(self, get_data, shared: Path, tmp_path: Path) -> None:
        with tarfile.open(shared / "conll2003.tar.xz") as tar:
            tar.extractall(tmp_path / "raw", filter="data")
        for file in CORPORA["conll2003"].files:
            path = tmp_path / "raw" / "conll2003" / file.output
            path.write_bytes(path.read_bytes()[:-2])
            path.rename(path.with_name(file.origin.name))
        assert get_data("conll2003", "--from", tmp_path / "raw").returncode == 0
        found = contents(get_data.out / "conll2003")
        assert all(found[file.output] == file.sha256 for file in CORPORA["conll2003"].files)

    def test_download_killed_and_continued(self, get_data, shared: Path, server) -> None:
        with tarfile.open(shared / "ptb.tar.xz") as tar:
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

    def test_all_of_iwslt14_only_on_request_and_labelled(self, get_data, shared: Path, tmp_path: Path) -> None:
        with tarfile.open(shared / "iwslt14-de-en.tar.xz") as tar:
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
