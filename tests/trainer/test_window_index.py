"""The window index in the cache: built once, rebuilt if incomplete, and checked against the files."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TEXT
from tests.trainer.corpora import load, write_lines
from trainer.errors import DataError
from trainer.sources import window_index
from trainer.sources.base import DocumentRef
from trainer.sources.window_indexer import WindowIndexer


def test_a_source_is_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    first = load(source)

    def fail(*_: Any) -> None:
        raise AssertionError("indexed again")

    monkeypatch.setattr(WindowIndexer, "run", fail)
    again = load(source | {"weight": 3, "name": "another"}, close_documents=True, max_samples=3)
    assert {s.text for s in again.train} <= {s.text for s in first.train}
    for other in ({"window_tokens": 41}, {"sources": [source | {"domain_column": "parity"}]}):
        with pytest.raises(AssertionError, match="indexed again"):
            load(source, **other)
    write_lines(tmp_path / "d.jsonl", 13)
    with pytest.raises(AssertionError, match="indexed again"):
        load(source)


def test_an_incomplete_index_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_index, "windows_dir", lambda: tmp_path / "windows")
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    expected = list(load(source).train)
    (folder,) = [p for p in (tmp_path / "windows").iterdir() if p.is_dir()]
    for name in ("windows", "documents", "summary.json"):
        with (folder / name).open("r+b") as file:
            file.truncate(100)
        assert list(load(source).train) == expected
        (folder / name).unlink()
        assert list(load(source).train) == expected


@pytest.mark.parametrize("name", ["windows", "documents", "summary.json", "manifest.json"])
def test_one_flipped_bit_anywhere_leads_to_another_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(window_index, "windows_dir", lambda: tmp_path / "windows")
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    corpus = load(source)
    expected = list(corpus.train)
    (folder,) = [p for p in (tmp_path / "windows").iterdir() if p.is_dir()]
    intact = (folder / name).read_bytes()
    for place in {0, len(intact) - 1} | {i * len(intact) // 19 for i in range(19)}:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        caplog.clear()
        again = load(source)
        assert list(again.train) == expected
        assert again.fingerprint == corpus.fingerprint
        assert f"is built again: {name} is damaged" in caplog.text
        assert (folder / name).read_bytes() == intact


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    expected = list(load(source).train)
    monkeypatch.setattr(window_index, "windows_dir", lambda: tmp_path / "d.jsonl" / "windows")
    assert list(load(source).train) == expected
    assert "cannot be kept in " in caplog.text
    assert "(Not a directory): it is built for this start only; free disk space, or set" in caplog.text
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"cannot write the window index to the cache or to a temporary directory \(No"):
        load(source)


@pytest.mark.parametrize("full_after", [1, 5, 12])
def test_a_disk_that_fills_up_during_the_indexing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_after: int
) -> None:
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    undisturbed = load(source)
    monkeypatch.setattr(window_index, "windows_dir", lambda: tmp_path / "windows")
    write, num_records = WindowIndexer._document_record, 0

    def fill_up(indexer: WindowIndexer, input_index: int, document: DocumentRef) -> bytes:
        nonlocal num_records
        num_records += 1
        if num_records == full_after:
            write(indexer, input_index, document)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(indexer, input_index, document)

    monkeypatch.setattr(WindowIndexer, "_document_record", fill_up)
    corpus = load(source)
    assert list(corpus.train) == list(undisturbed.train)
    assert (corpus.sources, corpus.fingerprint) == (undisturbed.sources, undisturbed.fingerprint)


def test_the_fingerprint_depends_on_contents_and_not_on_paths(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    corpus = load(source, held_out=2)
    moved = load({"files": [write_lines(tmp_path / "moved" / "e.jsonl")]}, held_out=2)
    assert moved.fingerprint == corpus.fingerprint
    others = [
        load(source, held_out=3),
        load(source, held_out=2, window_tokens=41),
        load(source, held_out=2, close_documents=True),
        load(source, held_out=2, max_samples=50),
        load(source | {"domain_column": "parity"}, held_out=2),
        load({"files": [write_lines(tmp_path / "f.jsonl", text=TEXT.replace("gull", "seal"))]}, held_out=2),
    ]
    assert len({c.fingerprint for c in [corpus, *others]}) == 7


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_changed_bytes_of_the_same_size_and_time_are_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_lines(path, 3)
    status = path.stat()
    train = load({"files": [str(path)]}).train
    sample = next(s for s in train if "gull" in s.text)
    path.write_text(path.read_text(encoding="utf-8").replace("gull", "seal"), encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for samples in (train, load({"files": [str(path)]}).train):
        with pytest.raises(DataError, match=f"sample {sample.name} has changed since it was indexed"):
            samples[sample.index]
