"""A corpus: windows of sources, drawn, held out, mixed, kept as numbers and read when they are asked for."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TEXT, tiny_vocabulary
from trainer.config import DataConfig, EvalConfig
from trainer.data import index
from trainer.data.order import batch_indices
from trainer.data.samples import Corpus, Samples, load_corpus
from trainer.data.scan import Pass
from trainer.data.windows import STRETCH_BYTES, cut_windows
from trainer.errors import ConfigError, DataError

BYTE_LEVEL = tiny_vocabulary("byte_level")


def write_lines(path: Path, count: int = 12, **columns: Any) -> str:
    rows = [{"text": f"{n}. {TEXT}", "parity": "ab"[n % 2]} | columns for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(*sources: dict[str, Any], held_out: int = 0, seed: int = 0, **data: Any) -> Corpus:
    config = DataConfig.model_validate({"sources": sources, "window_tokens": 40} | data)
    return load_corpus(config, EvalConfig(held_out_documents=held_out), BYTE_LEVEL, seed)


def documents_of(samples: Samples) -> set[str]:
    return {sample.name.partition("#")[0] for sample in samples}


# What is in it


def test_windows_are_those_of_each_text_in_order(tmp_path: Path) -> None:
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


def test_a_pattern_is_the_files_it_matches_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{n}.jsonl", 2) for n in (2, 1, 3)]
    (tmp_path / "4.jsonl.d").mkdir()
    by_pattern, by_name = load({"files": [str(tmp_path / "?.jsonl*")]}), load({"files": sorted(files)})
    assert by_pattern.fingerprint == by_name.fingerprint
    assert documents_of(by_pattern.train) == {f"{n}.jsonl:{line}" for n in (1, 2, 3) for line in (1, 2)}
    assert [source.name for source in by_pattern.sources] == ["?.jsonl*"]
    write_lines(tmp_path / "[1].jsonl", 1)
    assert documents_of(load({"files": [str(tmp_path / "[1].jsonl")]}).train) == {"[1].jsonl:1"}
    with pytest.raises(ConfigError, match=r"none-\*.jsonl matches no file"):
        load({"files": [str(tmp_path / "none-*.jsonl")]})


def test_samples_are_a_sequence_that_any_thread_may_read(tmp_path: Path) -> None:
    train = load({"files": [write_lines(tmp_path / "d.jsonl")]}).train
    one_by_one = list(train)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(train.__getitem__, range(len(train)))) == one_by_one
    assert train[-1] == one_by_one[-1]
    assert train[2:9:3] == one_by_one[2:9:3]
    with pytest.raises(IndexError):
        train[len(train)]


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    source = {"files": [write_lines(tmp_path / "corpus.jsonl")]}
    corpus = load(source, held_out=3, seed=5)
    train, held_out = documents_of(corpus.train), documents_of(corpus.held_out)
    assert len(train) == 9
    assert len(held_out) == 3
    assert not train & held_out
    again = load(source, held_out=3, seed=5)
    assert list(again.train) == list(corpus.train)
    assert again.fingerprint == corpus.fingerprint
    assert documents_of(load(source, held_out=3, seed=6).held_out) != held_out


def test_documents_are_held_out_over_all_sources(tmp_path: Path) -> None:
    sources = [{"files": [write_lines(tmp_path / name)]} for name in ("a.jsonl", "b.jsonl")]
    corpus = load(*sources, held_out=12)
    assert len(documents_of(corpus.held_out)) == 12
    assert {s.domain for s in corpus.held_out} == {s.domain for s in corpus.train} == {"a.jsonl", "b.jsonl"}


def test_samples_are_numbered_as_they_stand(tmp_path: Path) -> None:
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


def test_texts_and_chats_are_mixed_and_have_their_own_columns(tmp_path: Path) -> None:
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


def test_counts_of_each_source_are_said(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "t.jsonl").write_text('{"text": "two words"}\nno\n{"text": ""}\n', encoding="utf-8")
    twice = {"files": [str(tmp_path / "t.txt")], "weight": 2}
    text, other = load(twice, {"files": [str(tmp_path / "t.jsonl")], "name": "x"}, max_broken=1).sources
    windows = list(cut_windows(TEXT, BYTE_LEVEL, 40))
    assert (text.name, text.documents, text.windows, text.broken) == ("t.txt", 1, len(windows), 0)
    assert (text.tokens, text.num_bytes) == (sum(len(BYTE_LEVEL.encode(w)) for w in windows), len(TEXT.encode()))
    assert text.epoch_samples == 2 * len(windows)
    assert (other.name, other.documents, other.windows, other.num_bytes, other.broken) == ("x", 1, 1, 9, 1)
    assert other.first_broken == (f"{tmp_path}/t.jsonl, line 2: expected a JSON object, received 'no'",)


# What is refused


def test_broken_lines_end_the_run_past_a_limit_over_all_sources(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = []
    for name in ("a.jsonl", "b.jsonl"):
        path = tmp_path / name
        write_lines(path, 2)
        path.write_text("no\n[]\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
        sources.append({"files": [str(path)]})
    assert [s.broken for s in load(*sources, max_broken=4).sources] == [2, 2]
    for limit, says in [(0, "a.jsonl, line 1"), (1, "a.jsonl, line 1.*a.jsonl, line 2"), (3, "b.jsonl, line 2")]:
        with pytest.raises(DataError, match=rf"{says}.*data.max_broken leaves room for {limit % 2}\)"):
            load(*sources, max_broken=limit)


def test_a_pass_ends_with_the_first_line_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "windows_dir", lambda: tmp_path / "windows")
    path = tmp_path / "d.jsonl"
    write_lines(path, 3)
    path.write_text("no\n" * 50 + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 21:.*\(22 cannot be read|line 20: [^;]*\(22 cannot be read"):
        load({"files": [str(path)]}, max_broken=21)
    assert [p for p in (tmp_path / "windows").iterdir() if p.is_dir()] == []


def test_sources_without_windows_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    long = {"files": [write_lines(tmp_path / "long.jsonl")]}
    with pytest.raises(DataError, match="short.jsonl: no window of at least two tokens"):
        load(long, {"files": [str(tmp_path / "short.jsonl")]})
    with pytest.raises(DataError, match="long.jsonl: no window of at least two tokens to train on, with its weight"):
        load(long | {"weight": 0.001})


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are only 3 documents"):
        load({"files": [write_lines(tmp_path / "d.jsonl", 3)]}, held_out=3)


# What is kept


def test_a_source_is_passed_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    first = load(source)

    def refuse(*_: Any) -> None:
        raise AssertionError("it is passed over again")

    monkeypatch.setattr(Pass, "run", refuse)
    again = load(source | {"weight": 3, "name": "another"}, close_documents=True, max_samples=3)
    assert {s.text for s in again.train} <= {s.text for s in first.train}
    for other in ({"window_tokens": 41}, {"sources": [source | {"domain_column": "parity"}]}):
        with pytest.raises(AssertionError, match="passed over again"):
            load(source, **other)
    write_lines(tmp_path / "d.jsonl", 13)
    with pytest.raises(AssertionError, match="passed over again"):
        load(source)


def test_an_index_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "windows_dir", lambda: tmp_path / "windows")
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    expected = list(load(source).train)
    (folder,) = [p for p in (tmp_path / "windows").iterdir() if p.is_dir()]
    for name in ("windows", "documents", "summary.json"):
        with (folder / name).open("r+b") as file:
            file.truncate(100)
        assert list(load(source).train) == expected
        (folder / name).unlink()
        assert list(load(source).train) == expected


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"files": [write_lines(tmp_path / "d.jsonl")]}
    monkeypatch.setattr(index, "windows_dir", lambda: tmp_path / "d.jsonl" / "windows")
    with pytest.raises(
        DataError, match=r"cannot keep windows in .* \(Not a directory\): make room or set TUTELAGE_CACHE"
    ):
        load(source)


def test_the_fingerprint_is_of_contents_and_not_of_paths(tmp_path: Path) -> None:
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
def test_other_bytes_of_the_same_size_and_time_are_an_error(tmp_path: Path, name: str) -> None:
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


def test_windows_of_a_long_text_are_the_text(tmp_path: Path) -> None:
    text = "".join(f"{n} sacks of 日本語 and 😀\r\n" for n in range(STRETCH_BYTES // 25))
    (tmp_path / "d.txt").write_bytes(text.encode())
    train = load({"files": [str(tmp_path / "d.txt")]}).train
    assert "".join(s.text for s in train) == text
    assert [s.name for s in train[:3]] == ["d.txt#0", "d.txt#1", "d.txt#2"]
    assert train[-1].name == f"d.txt#{len(train) - 1}"


LARGE = 200_000_000
MEASURE = """
import sys
from pathlib import Path
from tests.trainer.test_data import load

def peak():  # of this process alone: getrusage would count the one that started it
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

load({"files": [sys.argv[1]]})
before = peak()
corpus = load({"files": [sys.argv[2]]}, held_out=5, window_tokens=400)
firsts = [s for s in corpus.train[::7] if s.name.endswith("#0")]
assert all(s.name == f"large.jsonl:{int(s.text.partition(' ')[0]) + 1}#0" for s in firsts) and firsts
print(len(corpus.train), peak() - before)
"""


def test_a_large_file_is_never_in_memory_whole(tmp_path: Path) -> None:
    """Most of it is a column that nobody reads: 200 MB of text would take a minute to tokenize."""
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


def test_epochs_of_two_sources_hold_what_their_weights_say(tmp_path: Path) -> None:
    sources = [{"files": [write_lines(tmp_path / name, 4)]} for name in ("a.jsonl", "b.jsonl")]
    corpus = load(sources[0] | {"weight": 0.5}, sources[1] | {"weight": 2}, max_windows_per_document=1)
    names = [[corpus.train[i].name for i in batch_indices(corpus.order, 10, epoch)] for epoch in (0, 1)]
    assert all(epoch.count(f"b.jsonl:{n}#0") == 2 for epoch in names for n in range(1, 5))
    halves = [{name for name in epoch if name.startswith("a")} for epoch in names]
    assert [len(half) for half in halves] == [2, 2]
    assert not halves[0] & halves[1]
