"""Fetching, unpacking, checking and publishing, on files made here."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import tarfile
import threading
from pathlib import Path

import corpus_files
import pytest
from corpora import CORPORA, NAMES, Corpus, File, Origin
from corpus_files import DataError

from ..patience import PATIENCE

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def fetch(server, target: Path, size: int = len(CONTENT), sha256: str = DIGEST) -> list[int]:
    """Fetch ``CONTENT`` from the server; what the progress bar was told."""
    told: list[int] = []
    corpus_files.fetch(f"{server.url}/text", target, size, sha256, told.append)
    return told


@pytest.fixture
def served(server):
    server.files["text"] = CONTENT
    return server


class TestFetch:
    def test_whole_file(self, served, tmp_path: Path) -> None:
        told = fetch(served, tmp_path / "text")
        assert (tmp_path / "text").read_bytes() == CONTENT
        assert told[-1] == len(CONTENT)
        assert told == sorted(told)

    def test_what_is_there_is_not_fetched_again(self, served, tmp_path: Path) -> None:
        fetch(served, tmp_path / "text")
        fetch(served, tmp_path / "text")
        assert served.asked == ["text"]

    def test_goes_on_where_the_connection_broke(self, served, tmp_path: Path) -> None:
        served.cuts = [300_000, 200_000]
        fetch(served, tmp_path / "text")
        assert (tmp_path / "text").read_bytes() == CONTENT
        assert served.asked == ["text", "text from 300000", "text from 500000"]

    def test_starts_anew_if_the_server_cannot_send_a_part(self, served, tmp_path: Path) -> None:
        served.cuts, served.ranges = [300_000], False
        fetch(served, tmp_path / "text")
        assert (tmp_path / "text").read_bytes() == CONTENT
        assert served.asked == ["text", "text"]

    def test_a_foreign_beginning_is_thrown_away(self, served, tmp_path: Path) -> None:
        (tmp_path / "text.part").write_bytes(b"x" * 1000)
        fetch(served, tmp_path / "text")
        assert (tmp_path / "text").read_bytes() == CONTENT
        assert served.asked == ["text from 1000", "text"]

    def test_a_server_that_gives_nothing_is_given_up(self, served, tmp_path: Path) -> None:
        served.cuts = [0] * 9
        with pytest.raises(DataError, match="ended early"):
            fetch(served, tmp_path / "text")
        assert len(served.asked) == corpus_files.PATIENCE
        assert not (tmp_path / "text").exists()

    def test_wrong_bytes_leave_nothing(self, served, tmp_path: Path) -> None:
        served.files["text"] = b"x" * len(CONTENT)
        with pytest.raises(DataError, match=f"wrong digest.*{DIGEST}"):
            fetch(served, tmp_path / "text")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
    def test_wrong_size_is_refused_before_it_is_received(self, served, tmp_path: Path, size: int) -> None:
        with pytest.raises(DataError, match=f"has {len(CONTENT)} bytes, not the expected {size}"):
            fetch(served, tmp_path / "text", size=size)
        assert list(tmp_path.iterdir()) == []

    def test_missing_file_is_named(self, server, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="/text: 404"):
            fetch(server, tmp_path / "text")

    def test_unreachable_server_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/text: .*refused"):
            corpus_files.fetch("http://127.0.0.1:9/text", tmp_path / "text", 1, DIGEST, lambda done: None)

    def test_only_web_addresses_are_mirrors(self) -> None:
        origin = Origin("https://example.org/a/text", 1, DIGEST)
        assert corpus_files.address(origin, None) == origin.url
        assert corpus_files.address(origin, "http://mirror/b/") == "http://mirror/b/text"
        with pytest.raises(DataError, match="http"):
            corpus_files.address(origin, "file:///etc")


def corpus(*members: str) -> Corpus:
    return Corpus("tiny", "", "", tuple(File(name, name, 0, "") for name in members))


def archive(path: Path, members: dict[str, bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


class TestUnpack:
    @pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz", "w:bz2"])
    def test_takes_what_belongs_to_the_corpus_and_no_more(self, tmp_path: Path, mode: str) -> None:
        path = archive(tmp_path / "a", {"tiny/one": b"1", "two": b"2", "tiny/other": b"3"}, mode)
        (tmp_path / "to").mkdir()
        corpus_files.unpack(path, corpus("one", "two", "three"), tmp_path / "to")
        found = {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()}
        assert found == {"tiny/one", "two"}

    @pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz"])
    @pytest.mark.parametrize("kept", [0.001, 0.3, 0.7])
    def test_truncated(self, tmp_path: Path, mode: str, kept: float) -> None:
        path = archive(tmp_path / "a", {"tiny/one": random.Random(0).randbytes(50_000)}, mode)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        (tmp_path / "to").mkdir()
        with pytest.raises(DataError, match="damaged or truncated"):
            corpus_files.unpack(path, corpus("one"), tmp_path / "to")

    @pytest.mark.parametrize("name", ["../escaped", "/../escaped", "tiny/../../escaped"])
    def test_members_that_leave_the_folder_are_refused(self, tmp_path: Path, name: str) -> None:
        path = archive(tmp_path / "a", {name: b"x"})
        (tmp_path / "to").mkdir()
        with pytest.raises(DataError, match="not a safe archive"):
            corpus_files.unpack(path, corpus("one", "../escaped"), tmp_path / "to")
        assert not (tmp_path / "escaped").exists()

    def test_a_python_that_cannot_tell_unpacks_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first releases of 3.10 and 3.11."""
        path = archive(tmp_path / "a", {"tiny/one": b"1"})
        (tmp_path / "to").mkdir()
        for name in ("data_filter", "FilterError"):
            monkeypatch.delattr(tarfile, name)
        with pytest.raises(DataError, match=r"a: Python \S+ cannot unpack archives safely; .* give the folder instead"):
            corpus_files.unpack(path, corpus("one"), tmp_path / "to")
        assert not any((tmp_path / "to").iterdir())

    def test_links_that_leave_the_folder_are_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a", "w") as tar:
            link = tarfile.TarInfo("tiny/one")
            link.type, link.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
            tar.addfile(link)
        (tmp_path / "to").mkdir()
        with pytest.raises(DataError, match="not a safe archive"):
            corpus_files.unpack(tmp_path / "a", corpus("one"), tmp_path / "to")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class TestCheck:
    def test_completing_what_the_origin_serves(self, tmp_path: Path) -> None:
        raw, whole = b"a\nb", b"a\nb\n\n"
        file = File("f", "f", len(whole), digest(whole), Origin("u/f", len(raw), digest(raw), b"\n\n"))
        for content in (raw, whole):
            (tmp_path / "raw").write_bytes(content)
            corpus_files.place(file, tmp_path / "raw", tmp_path / "f", "the raw one")
            assert (tmp_path / "f").read_bytes() == whole

    def test_wrongly_completed(self, tmp_path: Path) -> None:
        file = File("f", "f", 1, DIGEST, Origin("u/f", 1, digest(b"a"), b"b"))
        (tmp_path / "raw").write_bytes(b"a")
        with pytest.raises(DataError, match="the raw one: wrong digest"):
            corpus_files.place(file, tmp_path / "raw", tmp_path / "f", "the raw one")

    def test_without_a_digest_the_lines_are_counted(self, tmp_path: Path) -> None:
        (tmp_path / "raw").write_bytes(b"1\n2\n")
        corpus_files.place(File("f", "f", None, None, lines=2), tmp_path / "raw", tmp_path / "f", "the raw one")
        with pytest.raises(DataError, match="2 lines instead of 3"):
            corpus_files.place(File("f", "f", None, None, lines=3), tmp_path / "raw", tmp_path / "f", "the raw one")

    @pytest.fixture
    def parallel(self, tmp_path: Path) -> Path:
        for name in ("train.a", "train.b", "valid.a", "valid.b", "test.a", "test.b"):
            (tmp_path / name).write_bytes(b"1 1\n2\n3\n")
        return tmp_path

    @pytest.mark.parametrize("part", ["train", "valid", "test"])
    def test_sides_of_different_length(self, parallel: Path, part: str) -> None:
        corpus_files.check_parallel(parallel, ("a", "b"))
        (parallel / f"{part}.b").write_bytes(b"1\n2\n")
        with pytest.raises(DataError, match=rf"{part}\.a and {part}\.b differ in length: 3 and 2"):
            corpus_files.check_parallel(parallel, ("a", "b"))

    def test_blank_pairs_are_dropped_on_both_sides(self, parallel: Path) -> None:
        (parallel / "train.a").write_bytes(b"1\n \n3\n4\n")
        (parallel / "train.b").write_bytes(b"x\ny\n\nz\n")
        assert corpus_files.drop_blank_pairs(parallel, ("a", "b")) == 2
        assert (parallel / "train.a").read_bytes() == b"1\n4\n"
        assert (parallel / "train.b").read_bytes() == b"x\nz\n"

    def test_surplus_spaces_are_removed(self, parallel: Path) -> None:
        (parallel / "train.a").write_bytes(b" 1  1\n2 \n3\xc2\xa0x\n")
        assert corpus_files.squeeze_spaces(parallel, ("a", "b")) == 2
        assert (parallel / "train.a").read_bytes() == b"1 1\n2\n3\xc2\xa0x\n"
        assert corpus_files.squeeze_spaces(parallel, ("a", "b")) == 0


class TestExclusive:
    def test_folders_that_stay_empty_are_removed_again(self, tmp_path: Path) -> None:
        with corpus_files.exclusive(tmp_path / "a" / "b", lambda: None):
            assert (tmp_path / "a" / "b").is_dir()
        assert list(tmp_path.iterdir()) == []

    def test_folders_that_were_there_or_are_filled_stay(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        with corpus_files.exclusive(tmp_path / "old", lambda: None):
            pass
        with corpus_files.exclusive(tmp_path / "new", lambda: None):
            (tmp_path / "new" / "file").touch()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]

    def test_a_folder_that_its_holder_removed_is_made_anew(self, tmp_path: Path) -> None:
        folder, waits = tmp_path / "a", threading.Event()

        def work() -> None:
            with corpus_files.exclusive(folder, waits.set):
                (folder / "result").touch()

        worker = threading.Thread(target=work)
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        worker.start()
        assert waits.wait(PATIENCE)
        folder.rmdir()
        os.close(held)
        worker.join(PATIENCE)
        assert (folder / "result").exists()


class TestPublish:
    @pytest.fixture
    def stage(self, tmp_path: Path) -> Path:
        stage = tmp_path / ".c.staging"
        stage.mkdir()
        (stage / "text").write_text("new\n")
        corpus_files.write_manifest(stage, {"name": "c"})
        return stage

    def test_replaces_a_folder_and_leaves_nothing_behind(self, stage: Path, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "old").touch()
        corpus_files.publish(stage, tmp_path / "c")
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["manifest.json", "text"]
        corpus_files.verify_prepared(tmp_path / "c", {"name": "c"})

    def test_killed_between_the_renames(self, tmp_path: Path) -> None:
        (tmp_path / ".c.replaced").mkdir()
        (tmp_path / ".c.replaced" / "old").touch()
        corpus_files.recover(tmp_path / "c")
        assert (tmp_path / "c" / "old").exists()
        assert not (tmp_path / ".c.replaced").exists()

    def test_killed_after_the_renames(self, stage: Path, tmp_path: Path) -> None:
        (tmp_path / ".c.replaced").mkdir()
        stage.rename(tmp_path / "c")
        corpus_files.recover(tmp_path / "c")
        assert [path.name for path in tmp_path.iterdir()] == ["c"]

    @pytest.mark.parametrize("place", ["c", ".c.replaced"])
    @pytest.mark.parametrize("what", ["link", "link to nowhere", "link to a file", "file", "folder"])
    def test_whatever_is_there_is_replaced(self, stage: Path, tmp_path: Path, place: str, what: str) -> None:
        target = tmp_path / "target"
        if what == "folder":
            (tmp_path / place / "below").mkdir(parents=True)
        elif what == "file":
            (tmp_path / place).touch()
        else:
            if what == "link":
                target.mkdir()
                (target / "mine").touch()
            elif what == "link to a file":
                target.touch()
            (tmp_path / place).symlink_to(target)
        for _ in range(2):
            corpus_files.recover(tmp_path / "c")
            if stage.exists():
                corpus_files.publish(stage, tmp_path / "c")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == ({"c", "target"} if what in ("link", "link to a file") else {"c"})
        assert not (tmp_path / "c").is_symlink()
        corpus_files.verify_prepared(tmp_path / "c", {"name": "c"})
        assert (target / "mine").exists() == (what == "link"), "what a link leads to is the user's"

    def test_killed_between_the_renames_of_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        (tmp_path / ".c.replaced").symlink_to("target")
        corpus_files.recover(tmp_path / "c")
        assert os.readlink(tmp_path / "c") == "target"
        assert sorted(os.listdir(tmp_path)) == ["c", "target"]

    @pytest.mark.parametrize(
        "text",
        [
            '{"recipe": {}, "files": {"text": {}}}',
            '{"recipe": {}, "files": {"text": null}}',
            '{"recipe": {}, "files": {"text": []}}',
            '{"recipe": {}, "files": {"text": {"size": Infinity, "sha256": ""}}}',
            '{"recipe": {}, "files": {"text": {"size": "four", "sha256": ""}}}',
            '{"recipe": {}, "files": {"": {"size": 4, "sha256": ""}}}',
            '{"recipe": {}, "files": {"../c/text": {"size": 4, "sha256": ""}}}',
            '{"recipe": {}, "files": {"\\u0000": {"size": 4, "sha256": ""}}}',
            '{"recipe": {}, "files": []}',
            '{"recipe": [], "files": {}}',
            '{"recipe": {}}',
            "{}",
            "[]",
            "",
            "[" * 100_000,
            None,
        ],
    )
    def test_a_manifest_that_is_none_is_damaged(self, tmp_path: Path, text: str | None) -> None:
        (tmp_path / "text").write_text("new\n")
        if text is None:
            (tmp_path / "manifest.json").mkdir()
        else:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json is damaged; --force replaces it"):
            corpus_files.verify_prepared(tmp_path, {})

    def test_every_difference_is_noticed(self, stage: Path, tmp_path: Path) -> None:
        final = tmp_path / "c"
        corpus_files.publish(stage, final)
        with pytest.raises(DataError, match="other options"):
            corpus_files.verify_prepared(final, {"name": "d"})
        (final / "text").write_text("odd\n")
        with pytest.raises(DataError, match="text was changed"):
            corpus_files.verify_prepared(final, {"name": "c"})
        (final / "text").unlink()
        with pytest.raises(DataError, match="lacks text"):
            corpus_files.verify_prepared(final, {"name": "c"})
        (final / "manifest.json").write_text("[1]")
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            corpus_files.verify_prepared(final, {"name": "c"})
        (final / "manifest.json").unlink()
        with pytest.raises(DataError, match="did not make it"):
            corpus_files.verify_prepared(final, {"name": "c"})


class TestTable:
    def test_digests_are_digests_and_addresses_are_fixed(self) -> None:
        for corpus in CORPORA.values():
            for file in corpus.files:
                assert len(bytes.fromhex(file.sha256)) == 32
                assert file.size > 0
                if file.origin:
                    assert file.origin.url.startswith("https://")
                    assert len(bytes.fromhex(file.origin.sha256)) == 32
                    assert "/master/" not in file.origin.url

    def test_names_at_an_origin_are_unique(self) -> None:
        for corpus in CORPORA.values():
            names = [file.origin.name for file in corpus.files if file.origin]
            assert len(set(names)) == len(names)

    def test_what_cannot_be_verified_is_labelled(self) -> None:
        assert [name for name, corpus in CORPORA.items() if not corpus.fetchable] == ["iwslt14-de-en"]
        assert all(bool(c.partial) == bool(c.undigested) == (not c.fetchable) for c in CORPORA.values())
        assert set(NAMES) == {*CORPORA, "demo"}
