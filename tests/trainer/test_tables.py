"""Tables as sources: Parquet files, datasets saved to disk, and the errors if they cannot be read."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.needs import need
from tests.tiny import TEXT, tiny_vocabulary
from tests.trainer.runs import losses, run_config
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.evaluation.config import EvalConfig
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus, load_corpus
from trainer.training.loop import train

BYTE_LEVEL = tiny_vocabulary("byte_level")
ROWS = [{"text": f"{n}. {TEXT}", "kind": "ab"[n % 2], "by": f"t{n % 2}", "size": n} for n in range(6)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("datasets")
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))


def load(source: dict[str, Any], **data: Any) -> Corpus:
    config = DataConfig.model_validate({"sources": [source], "window_tokens": 40} | data)
    return load_corpus(config, EvalConfig(), BYTE_LEVEL, 0)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def save(folder: Path, rows: list[dict[str, Any]], *splits: str) -> str:
    import datasets

    dataset = datasets.Dataset.from_list(rows)
    (datasets.DatasetDict(dict.fromkeys(splits, dataset)) if splits else dataset).save_to_disk(folder)
    return str(folder)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contents(corpus: Corpus) -> list[tuple[Any, ...]]:
    return [(s.name.partition(":")[2], s.text, s.messages, s.tools, s.teacher) for s in corpus.train]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_rows_give_the_same_documents_as_lines(tmp_path: Path, kind: str) -> None:
    columns = {"domain_column": "kind", "teacher_column": "by"}
    lines = load({"files": [write_lines(tmp_path / "d.jsonl", ROWS)]} | columns)
    if kind == "parquet":
        rows = load({"files": [write_parquet(tmp_path / "d.parquet", ROWS)]} | columns)
    else:
        rows = load({"dataset": save(tmp_path / "d", ROWS)} | columns)
    assert contents(rows) == contents(lines)
    assert [s.domain for s in rows.train] == [s.domain for s in lines.train]
    assert rows.fingerprint == lines.fingerprint
    assert rows.train[0].name == ("d.parquet:1#0" if kind == "parquet" else "d:1#0")


@pytest.mark.parametrize("arguments", ['{"sack": 3, "unit": null}', {"sack": 3}])
def test_chats_in_rows_keep_their_original_keys(tmp_path: Path, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "weigh", "arguments": arguments}}
    chats = [
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}],
        [{"role": "user", "content": "Weigh."}, {"role": "assistant", "content": "", "tool_calls": [call]}],
    ]
    tools = [{"type": "function", "function": {"name": "weigh"}}]
    rows = [{"messages": chat, "tools": tools} for chat in chats]
    lines = load({"files": [write_lines(tmp_path / "c.jsonl", rows)]})
    assert list(lines.train[0].messages) == chats[0]
    for source in ({"files": [write_parquet(tmp_path / "c.parquet", rows)]}, {"dataset": save(tmp_path / "c", rows)}):
        corpus = load(source)
        assert corpus.sources[0].format == "chats: columns messages, tools"
        assert [list(s.messages) for s in corpus.train] == [list(s.messages) for s in lines.train]
        assert [list(s.tools) for s in corpus.train] == [tools] * 2
        assert corpus.fingerprint == lines.fingerprint


def test_explicit_nulls_of_tool_arguments_survive_in_rows_as_in_lines(tmp_path: Path) -> None:
    """`datasets` stores objects whose keys differ as JSON, so that a null is not mistaken for an absent key."""
    import datasets

    def call(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        function = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "content": None, "tool_calls": [function]}, {"role": "tool", "content": "x"}]

    rows = [{"messages": call({"city": "Oslo"})}, {"messages": call({"n": 3, "unit": None, "deep": [{"a": None}]})}]
    lines = write_lines(tmp_path / "d.jsonl", rows)
    dataset = datasets.Dataset.from_json(lines, cache_dir=str(tmp_path / "hf"))
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "folder")
    expected = [list(s.messages) for s in load({"files": [lines]}).train]
    assert [chat[0]["tool_calls"][0]["function"]["arguments"] for chat in expected] == [
        {"city": "Oslo"},
        {"n": 3, "unit": None, "deep": [{"a": None}]},
    ]
    for source in ({"files": [str(tmp_path / "d.parquet")]}, {"dataset": str(tmp_path / "folder")}):
        assert [list(s.messages) for s in load(source).train] == expected


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_of_both_kinds_give_the_same_documents_as_lines(tmp_path: Path, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with writer(tmp_path / "d.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    columns = {"domain_column": "kind", "teacher_column": "by"}
    rows = load({"files": [str(tmp_path / "d.arrow")]} | columns)
    assert contents(rows) == contents(load({"files": [write_lines(tmp_path / "d.jsonl", ROWS)]} | columns))
    assert rows.sources[0].format == "texts: column text"
    damaged = (tmp_path / "d.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(DataError, match=r"cannot read .*cut\.arrow: ") as error:
        load({"files": [str(tmp_path / "cut.arrow")]})
    assert ("Not an Arrow file" in str(error.value)) == (not stream)


@pytest.mark.parametrize(
    "change", [lambda data, second: data[:second], lambda data, _: data[:-8], lambda data, _: data + b"x"]
)
def test_an_arrow_stream_that_is_cut_between_two_batches_or_continues_is_rejected(
    tmp_path: Path, change: Callable[[bytes, int], bytes]
) -> None:
    """pyarrow reads such a stream up to the place, without an error."""
    batch = pa.RecordBatch.from_pylist(ROWS)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        second = sink.tell()
        writer.write_batch(batch)
    (tmp_path / "d.arrow").write_bytes(change(sink.getvalue().to_pybytes(), second))
    with pytest.raises(
        DataError, match=r"cannot read .*d\.arrow: .*its end mark: .*its writer was not closed: write it"
    ):
        load({"files": [str(tmp_path / "d.arrow")]})


def test_a_table_that_changes_during_the_run_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", ROWS)
    train = load({"files": [path]}).train
    assert train[0].text
    write_parquet(tmp_path / "d.parquet", ROWS[:3])
    with pytest.raises(DataError, match=r"d\.parquet has changed during the run"):
        train[0]


def test_tables_are_read_without_a_cache_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "file"))
    corpus = load({"files": [write_parquet(tmp_path / "d.parquet", ROWS)]})
    assert corpus.train[0].text.startswith("0. ")
    assert "file/datasets cannot be written (Not a directory): tables are converted for this start only" in caplog.text
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match="cannot convert tables in the cache or in a temporary directory"):
        load({"files": [write_parquet(tmp_path / "e.parquet", ROWS)]})


def test_a_full_disk_of_the_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("while generating") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(DataError, match=r"d\.parquet: No space left on device in the cache: free disk space, or set"):
        load({"files": [write_parquet(tmp_path / "d.parquet", ROWS)]})


def test_invalid_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", [ROWS[0], {"text": None}, {"text": ""}, ROWS[1]])
    corpus = load({"files": [path]}, max_invalid=1)
    assert corpus.sources[0].documents == 2
    assert corpus.sources[0].first_invalid == (f"{path}, row 2: 'text' is missing, expected a string",)
    with pytest.raises(DataError, match=r"d.parquet, row 2: 'text' is missing.*data.max_invalid allows 0"):
        load({"files": [path]})


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", ROWS)
    with pytest.raises(DataError, match=r"d.parquet has no column 'body'; it has "):
        load({"files": [path], "text_column": "body"})


def test_a_split_must_be_given_if_there_are_several(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", ROWS, "train", "test")
    assert load({"dataset": folder, "split": "test"}).sources[0].documents == 6
    with pytest.raises(DataError, match="has the splits train, test: set split to one of them"):
        load({"dataset": folder})
    assert load({"dataset": save(tmp_path / "one", ROWS, "only")}).sources[0].documents == 6


def test_a_dataset_name_is_resolved_under_the_cache(tmp_path: Path) -> None:
    save(tmp_path / "cache" / "data" / "harbour", ROWS)
    assert load({"dataset": "harbour"}).train[0].name == "harbour:1#0"


def test_a_file_or_folder_that_is_not_a_table_is_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 it is not")
    with pytest.raises(DataError, match="cannot read .*d.parquet: "):
        load({"files": [str(tmp_path / "d.parquet")]})
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot load the dataset .*folder"):
        load({"dataset": str(tmp_path / "folder")})


@pytest.mark.slow
def test_an_unreachable_dataset_is_one_error_line(tmp_path: Path) -> None:
    """Run in a separate process, because HF_HUB_OFFLINE is read at import."""
    code = (
        "from tests.trainer.test_tables import load\n"
        "from trainer.errors import DataError\n"
        "try:\n    load({'dataset': 'nobody/nothing-of-that-name'})\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TUTELAGE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("data.sources: cannot load the dataset nobody/nothing-of-that-name (no folder"), done
    assert done.stdout.count("\n") == 1


def test_the_error_without_the_datasets_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"need the package extra: tutelage\[data\]"):
        load({"files": [write_parquet(tmp_path / "d.parquet", ROWS)]})


def test_a_run_resumes_after_its_lines_were_converted_to_rows(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity of the data depends on contents, not on the file format."""
    for name in ("straight", "halves"):
        lines = run_config(tiny_byte_level, Path(write_lines(tmp_path / "d.jsonl", ROWS)), tmp_path / name, [])
        train(lines, stop_at=None if name == "straight" else 3)
    raw = lines.model_dump()
    raw["data"]["sources"] = [{"dataset": save(tmp_path / "d", ROWS)}]
    train(RunConfig.model_validate(raw), resume=True)
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "straight"), abs=1e-6)


def test_a_string_that_is_not_utf8_is_an_invalid_row(tmp_path: Path) -> None:
    strings = pa.array([TEXT.encode(), b"\xff\xfeab", TEXT.encode(), b"a\xff"], pa.binary())
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 4, strings.buffers())}), path)
    with pytest.raises(DataError, match=r"d\.parquet, row 2: not UTF-8: byte 0xff at 0"):
        load({"files": [str(path)]})
    corpus = load({"files": [str(path)]}, max_invalid=2)
    assert corpus.sources[0].invalid == 2
    assert {sample.name.partition("#")[0] for sample in corpus.train} == {"d.parquet:1", "d.parquet:3"}


@pytest.mark.parametrize("content", [b"PAR1" + b"\xff" * 1000 + b"PAR1", b"garbage"])
def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*d\.parquet"):
        load({"files": [str(tmp_path / "d.parquet")]})


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
@pytest.mark.parametrize("format", ["messages", "prompt_completion"])
def test_a_time_beyond_the_year_9999_is_an_invalid_row(tmp_path: Path, format: str, suffix: str) -> None:
    time = pa.timestamp("us")
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("at", time)]))
    rows = [[{"role": "user", "content": "x", "at": at}, {"role": "assistant", "content": "y"}] for at in (2**62, None)]
    columns = {"messages": rows} if format == "messages" else {"prompt": rows, "completion": rows}
    table = pa.table({name: pa.array(values, kind) for name, values in columns.items()})
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    source = {"files": [str(path)], "record_format": format}
    with pytest.raises(DataError, match=rf"{path}, row 1: "):
        load(source)
    (report,) = load(source, max_invalid=1).sources
    assert (report.documents, report.invalid) == (1, 1)
    assert report.format.startswith("chats: ")
