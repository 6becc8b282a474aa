"""The file: never half written, never confused with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd_plugin import UsageError
from sd_plugin.bench import results

DOCUMENT = {"kind": results.KIND, "schema": results.SCHEMA, "x": 1.5}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.save(DOCUMENT, path)
    assert results.load(path) == DOCUMENT
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert path.stat().st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    import os

    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    results.save(DOCUMENT, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        results.save({"x": float("nan")}, path)
    monkeypatch.setattr(results.os, "replace", _fail)
    with pytest.raises(OSError, match="full"):
        results.save({}, path)
    assert results.load(path) == DOCUMENT
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def _fail(*arguments: object) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "was not written by sd-plugin bench"),
        ('{"kind": "other"}', "was not written by sd-plugin bench"),
        (json.dumps({**DOCUMENT, "schema": results.SCHEMA + 1}), "by a newer sd-plugin"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "b.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        results.load(path)
    assert "b.json" in str(caught.value)
