"""The corpus: windows of sources, held out, drawn, mixed, indexed on disk and read on access."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TEXT
from tests.trainer.corpora import BYTE_LEVEL, load, write_lines
from trainer.errors import ConfigError, DataError
from trainer.sources import window_index
from trainer.sources.corpus import Samples
from trainer.sources.sample_order import batch_indices
from trainer.sources.windows import CHUNK_BYTES, cut_windows


def document_names(samples: Samples) -> set[str]:
    return {sample.name.partition("#")[0] for sample in samples}


# Contents


def test_samples_are_the_windows_of_each_text_in_order(tmp_path: Path) -> None:
    corpus = load({"files": [write_lines(tmp_path / "d.jsonl", 3)]})
    expected = [
        (f"d.jsonl:{n + 1}#{i}", piece)
        for n in range(3)
        for i, piece in enumerate(cut_windows(f"{n}. {TEXT}", BYTE_LEVEL, 40))
        if len(BYTE_LEVEL.encode(piece)) >= 2
    ]
    assert [(s.name, s.text) for s in corpus.train] == expected
    assert [s.index for s in corpus.train] == list(range(len(expected)))
    assert {s.domain for s in corpus.train} == {"d.jsonl"}


def test_a_pattern_expands_to_the_matching_files_sorted_by_name(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{n}.jsonl", 2) for n in (2, 1, 3)]
    (tmp_path / "4.jsonl.d").mkdir()
    by_pattern, by_name = load({"files": [str(tmp_path / "?.jsonl*")]}), load({"files": sorted(files)})
    assert by_pattern.fingerprint == by_name.fingerprint
    assert document_names(by_pattern.train) == {f"{n}.jsonl:{line}" for n in (1, 2, 3) for line in (1, 2)}
    assert [source.name for source in by_pattern.sources] == ["?.jsonl*"]
    write_lines(tmp_path / "[1].jsonl", 1)
    assert document_names(load({"files": [str(tmp_path / "[1].jsonl")]}).train) == {"[1].jsonl:1"}
    with pytest.raises(ConfigError, match=r"none-\*.jsonl matches no file"):
        load({"files": [str(tmp_path / "none-*.jsonl")]})


def test_samples_are_a_thread_safe_sequence(tmp_path: Path) -> None:
    train = load({"files": [write_lines(tmp_path / "d.jsonl")]}).train
    one_by_one = list(train)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(train.__getitem__, range(len(train)))) == one_by_one
    assert train[-1] == one_by_one[-1]
    assert train[2:9:3] == one_by_one[2:9:3]
    with pytest.raises(IndexError):
        train[len(train)]


def test_held_out_documents_are_not_in_the_training_samples(tmp_path: Path) -> None:
    source = {"files": [write_lines(tmp_path / "corpus.jsonl")]}
    corpus = load(source, held_out=3, seed=5)
    train, held_out = document_names(corpus.train), document_names(corpus.held_out)
    assert len(train) == 9
    assert len(held_out) == 3
    assert not train & held_out
    again = load(source, held_out=3, seed=5)
    assert list(again.train) == list(corpus.train)
    assert again.fingerprint == corpus.fingerprint
    assert document_names(load(source, held_out=3, seed=6).held_out) != held_out


def test_held_out_documents_are_drawn_from_all_sources(tmp_path: Path) -> None:
    sources = [{"files": [write_lines(tmp_path / name)]} for name in ("a.jsonl", "b.jsonl")]
    corpus = load(*sources, held_out=12)
    assert len(document_names(corpus.held_out)) == 12
    assert {s.domain for s in corpus.held_out} == {s.domain for s in corpus.train} == {"a.jsonl", "b.jsonl"}


def test_drawn_samples_are_numbered_consecutively(tmp_path: Path) -> None:
    source = {"files": [write_lines(tmp_path / "corpus.jsonl")]}
    corpus = load(source, max_samples=7, max_windows_per_document=2)
    assert [s.index for s in corpus.train] == list(range(7))
    assert {s.name[-2:] for s in corpus.train} == {"#0", "#1"}
    assert corpus.order.epoch_samples == 7


def test_only_the_last_window_of_a_document_closes(tmp_path: Path) -> None:
    corpus = load({"files": [write_lines(tmp_path / "d.jsonl", 2)]}, window_tokens=100, close_documents=True)
    closing = [s for s in corpus.train if s.closes]
    assert len(closing) == 2
    assert all(TEXT.endswith(s.text) for s in closing)


def test_texts_and_chats_can_be_mixed_with_different_columns(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "How heavy?"}, {"role": "assistant", "content": "14.5"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"turns": chat, "for": "t1"}) + "\n", encoding="utf-8")
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    corpus = load(
        {"files": [str(tmp_path / "t.txt")], "name": "prose"},
        {"files": [str(tmp_path / "c.jsonl")], "messages_column": "turns", "teacher_column": "for"},
        {"files": [write_lines(tmp_path / "d.jsonl", 2)], "domain_column": "parity"},
        close_documents=True,
    )
    (one,) = [s for s in corpus.train if s.is_chat]
    assert (one.name, list(one.messages), one.teacher, one.domain) == ("c.jsonl:1", chat, "t1", "c.jsonl")
    assert not one.closes
    assert {s.domain for s in corpus.train} == {"prose", "c.jsonl", "a", "b"}
    assert "".join(s.text for s in corpus.train if s.domain == "prose") == TEXT
    assert corpus.train.teachers() == {None: "t.txt#0", "t1": "c.jsonl:1"}


def test_source_counts_are_reported_per_source(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "t.jsonl").write_text('{"text": "two words"}\nno\n{"text": ""}\n', encoding="utf-8")
    twice = {"files": [str(tmp_path / "t.txt")], "weight": 2}
    text, other = load(twice, {"files": [str(tmp_path / "t.jsonl")], "name": "x"}, max_invalid=1).sources
    windows = list(cut_windows(TEXT, BYTE_LEVEL, 40))
    assert (text.name, text.documents, text.windows, text.invalid) == ("t.txt", 1, len(windows), 0)
    assert (text.tokens, text.num_bytes) == (sum(len(BYTE_LEVEL.encode(w)) for w in windows), len(TEXT.encode()))
    assert text.epoch_samples == 2 * len(windows)
    assert (other.name, other.documents, other.windows, other.num_bytes, other.invalid) == ("x", 1, 1, 9, 1)
    assert other.first_invalid == (f"{tmp_path}/t.jsonl, line 2: expected a JSON object, received 'no'",)


# Errors


def test_more_invalid_records_than_max_invalid_over_all_sources_are_an_error(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = []
    for name in ("a.jsonl", "b.jsonl"):
        path = tmp_path / name
        write_lines(path, 2)
        path.write_text("no\n[]\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
        sources.append({"files": [str(path)]})
    assert [s.invalid for s in load(*sources, max_invalid=4).sources] == [2, 2]
    for limit, expected in [(0, "a.jsonl, line 1"), (1, "a.jsonl, line 1.*a.jsonl, line 2"), (3, "b.jsonl, line 2")]:
        with pytest.raises(DataError, match=rf"{expected}.*data.max_invalid allows {limit % 2} in this source\)"):
            load(*sources, max_invalid=limit)


def test_indexing_stops_at_the_first_invalid_record_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_index, "windows_dir", lambda: tmp_path / "windows")
    path = tmp_path / "d.jsonl"
    write_lines(path, 3)
    path.write_text("no\n" * 50 + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 21:.*\(22 invalid records|line 20: [^;]*\(22 invalid records"):
        load({"files": [str(path)]}, max_invalid=21)
    assert [p for p in (tmp_path / "windows").iterdir() if p.is_dir()] == []


def test_a_source_without_windows_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    long = {"files": [write_lines(tmp_path / "long.jsonl")]}
    with pytest.raises(DataError, match="short.jsonl: no window of at least two tokens"):
        load(long, {"files": [str(tmp_path / "short.jsonl")]})
    with pytest.raises(DataError, match="long.jsonl: no window of at least two tokens to train on, given its weight"):
        load(long | {"weight": 0.001})


def test_holding_out_all_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are only 3 documents"):
        load({"files": [write_lines(tmp_path / "d.jsonl", 3)]}, held_out=3)


def test_windows_of_a_long_text_concatenate_to_the_text(tmp_path: Path) -> None:
    text = "".join(f"{n} sacks of 日本語 and 😀\r\n" for n in range(CHUNK_BYTES // 25))
    (tmp_path / "d.txt").write_bytes(text.encode())
    train = load({"files": [str(tmp_path / "d.txt")]}).train
    assert "".join(s.text for s in train) == text
    assert [s.name for s in train[:3]] == ["d.txt#0", "d.txt#1", "d.txt#2"]
    assert train[-1].name == f"d.txt#{len(train) - 1}"


LARGE = 200_000_000
MEASURE = """
import sys
from pathlib import Path
from tests.trainer.corpora import load

def peak():  # VmHWM is of this process alone; getrusage would include the parent's
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

load({"files": [sys.argv[1]]})
before = peak()
corpus = load({"files": [sys.argv[2]]}, held_out=5, window_tokens=400)
firsts = [s for s in corpus.train[::7] if s.name.endswith("#0")]
assert all(s.name == f"large.jsonl:{int(s.text.partition(' ')[0]) + 1}#0" for s in firsts) and firsts
print(len(corpus.train), peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path: Path) -> None:
    """Most of the file is an unused column, since tokenizing 200 MB of text would take a minute."""
    small, large = Path(write_lines(tmp_path / "small.jsonl")), tmp_path / "large.jsonl"
    rest = json.dumps({"page": "<p>Sacks</p>" * 40_000})[1:]
    with large.open("w", encoding="utf-8") as file:
        num = 0
        while file.tell() < LARGE:
            file.write(f'{{"text": {json.dumps(f"{num} {TEXT[:900]}")}, {rest}\n')
            num += 1
    environment = os.environ | {"TUTELAGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_train, grown = map(int, done.stdout.split())
    assert num_train == num - 5
    assert grown < LARGE / 4, grown


def test_epochs_draw_from_each_source_according_to_its_weight(tmp_path: Path) -> None:
    sources = [{"files": [write_lines(tmp_path / name, 4)]} for name in ("a.jsonl", "b.jsonl")]
    corpus = load(sources[0] | {"weight": 0.5}, sources[1] | {"weight": 2}, max_windows_per_document=1)
    names = [[corpus.train[i].name for i in batch_indices(corpus.order, 10, epoch, epochs=2)] for epoch in (0, 1)]
    assert all(epoch.count(f"b.jsonl:{n}#0") == 2 for epoch in names for n in range(1, 5))
    halves = [{name for name in epoch if name.startswith("a")} for epoch in names]
    assert [len(half) for half in halves] == [2, 2]
    assert not halves[0] & halves[1]


def test_a_line_is_held_out_in_every_source_that_reads_it(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{n}. {TEXT}", "answer": f"{TEXT} {n}."}) for n in range(12)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to("d.jsonl")
    corpus = load(
        {"files": [str(tmp_path / "d.jsonl")], "text_column": "question"},
        {"files": [str(tmp_path / "link.jsonl")], "text_column": "answer"},
        held_out=5,
    )
    held, trained = ({name.partition(":")[2] for name in document_names(s)} for s in (corpus.held_out, corpus.train))
    assert held
    assert trained
    assert not held & trained
    assert {sample.domain for sample in corpus.held_out} == {"d.jsonl", "link.jsonl"}


def test_a_source_whose_files_an_earlier_one_reads_is_left_out_with_a_message(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", 4)
    (tmp_path / "link.jsonl").symlink_to("d.jsonl")
    corpus = load({"files": [path]}, {"files": [str(tmp_path / "link.jsonl"), path]})
    (source,) = corpus.sources
    assert source.documents == 4
    assert source.repeated == (
        f"{tmp_path / 'link.jsonl'} is {path}, which is read once",
        f"{path} is {path}, which is read once",
    )
