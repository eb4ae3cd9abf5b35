"""Data files of every format and compression: the same samples, named by the user's file, or one sentence."""

import bz2
import gzip
import json
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tiny import TEXT
from tests.trainer.corpora import load
from trainer.errors import DataError
from trainer.sources import SOURCES, compression, csv_files, data_file, json_files
from trainer.sources.compression import DECOMPRESSORS
from trainer.sources.corpus import Corpus
from trainer.sources.encoding import decoded
from trainer.sources.json_files import array_to_lines

ROWS = [{"text": f'{n}. "Sacks", of\r\nrope; {TEXT[:90]}', "kind": "ab"[n % 2]} for n in range(4)]
CHUNK = 7


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    compressed: bytes = sink.getvalue().to_pybytes()
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress
}  # fmt: skip


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "".join(delimiter.join(row) + "\n" for row in [[*rows[0]], *quoted]).encode()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


CONTENT: dict[str, bytes] = {
    ".jsonl": json_lines(ROWS),
    ".ndjson": json_lines(ROWS),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": delimited(ROWS, ","),
    ".tsv": delimited(ROWS, "\t"),
    ".parquet": parquet(ROWS),
    ".arrow": arrow(ROWS),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_file, "converted_dir", lambda: tmp_path / "cache" / "converted")


def load_file(path: Path, content: bytes, **source: Any) -> Corpus:
    path.write_bytes(content)
    return load({"files": [str(path)]} | source)


@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_format_gives_the_same_samples(tmp_path: Path, suffix: str, compressed: str) -> None:
    expected = load_file(tmp_path / "expected.jsonl", json_lines(ROWS), domain_column="kind")
    name = f"d{suffix}{compressed}"
    corpus = load_file(tmp_path / name, COMPRESS[compressed](CONTENT[suffix]), domain_column="kind")
    assert [(s.text, s.domain) for s in corpus.train] == [(s.text, s.domain) for s in expected.train]
    assert [s.name for s in corpus.train] == [s.name.replace("expected.jsonl", name) for s in expected.train]
    assert corpus.fingerprint == expected.fingerprint
    assert corpus.sources[0].format == "texts: column text"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_texts_are_read_without_a_byte_order_mark(tmp_path: Path, suffix: str, compressed: str, mark: bytes) -> None:
    corpus = load_file(tmp_path / f"d{suffix}{compressed}", COMPRESS[compressed](mark + TEXT.encode()))
    assert "".join(sample.text for sample in corpus.train) == TEXT


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_not_part_of_a_record(tmp_path: Path, suffix: str) -> None:
    corpus = load_file(tmp_path / f"d{suffix}", b"\xef\xbb\xbf" + CONTENT[suffix])
    assert corpus.train[0].text.startswith('0. "Sacks"')
    assert corpus.sources[0].invalid == 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".txt.gz"])
def test_another_unicode_encoding_is_named(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = json_lines(ROWS).decode() if suffix != ".json" else json.dumps(ROWS)
    content = COMPRESS[".gz" if suffix.endswith(".gz") else ""](text.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(DataError, match=rf"d{suffix} is {name}, expected UTF-8: convert it, for example with `iconv"):
        load_file(tmp_path / f"d{suffix}", content)


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt"])
def test_a_file_that_is_not_utf8_is_an_error_with_the_offset(tmp_path: Path, suffix: str) -> None:
    content = CONTENT.get(suffix, TEXT.encode())
    place = content.index(b" ", 40)
    with pytest.raises(DataError, match=rf"d{suffix} is not UTF-8: byte 0xe9 at {place}"):
        load_file(tmp_path / f"d{suffix}", content[:place] + b"\xe9" + content[place:])
    with pytest.raises(DataError, match=rf"at {place}: convert it from its encoding, for example with `iconv"):
        load_file(tmp_path / f"d{suffix}", content[:place] + b"\xe9" + content[place:])
    with pytest.raises(DataError, match=r"not UTF-8: it ends within the character that begins at 3"):
        list(decoded([b"abc", b"\xe6\x97"], tmp_path))


@pytest.mark.parametrize("compressed", list(DECOMPRESSORS))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_a_compressed_content_without_its_suffix_is_named(tmp_path: Path, suffix: str, compressed: str) -> None:
    content = COMPRESS[compressed](CONTENT.get(suffix, TEXT.encode()))
    with pytest.raises(DataError, match=rf"d{suffix} is compressed \({compressed}\).*: name it d{suffix}{compressed}$"):
        load_file(tmp_path / f"d{suffix}", content)
    with pytest.raises(DataError, match=rf"is compressed \({compressed}\), expected text: decompress it once more"):
        load_file(tmp_path / f"d{suffix}.gz", gzip.compress(content))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (parquet(ROWS), 'a Parquet file, expected text: name it *.parquet, or set file_format = "parquet"'),
        (b"ARROW1\0\0" + bytes(20), 'an Arrow file, expected text: name it *.arrow, or set file_format = "arrow"'),
        (b"PK\3\4" + bytes(20), "a zip archive, expected text: extract it"),
    ],
)
def test_a_binary_file_with_the_suffix_of_text_is_named(tmp_path: Path, suffix: str, content: bytes, kind: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"d{suffix} is {kind}")):
        load_file(tmp_path / f"d{suffix}", content)


@pytest.mark.parametrize("compressed", list(DECOMPRESSORS))
def test_damaged_compressed_files_are_one_sentence(tmp_path: Path, compressed: str) -> None:
    content = COMPRESS[compressed](b"".join(os.urandom(40).hex().encode() + b"\n" for _ in range(3000)))
    for wrong in (content[: len(content) // 2], b"no compressed file", b"x" + content[1:]):
        with pytest.raises(DataError, match=rf"cannot decompress .*d.txt{compressed}: \w"):
            load_file(tmp_path / f"d.txt{compressed}", wrong)
    assert load_file(tmp_path / f"d.txt{compressed}", content).sources[0].num_bytes == 3000 * 81
    with pytest.raises(DataError, match="is empty: expected a file of at least one byte"):
        load_file(tmp_path / f"e.txt{compressed}", COMPRESS[compressed](b""))


@pytest.mark.parametrize("compressed", list(DECOMPRESSORS))
def test_streams_are_joined_and_what_follows_them_is_not_ignored(tmp_path: Path, compressed: str) -> None:
    first, second = COMPRESS[compressed](b"six sacks\n" * 300_000), COMPRESS[compressed](b"and a clock\n")
    corpus = load_file(tmp_path / f"d.txt{compressed}", first + second)
    assert corpus.sources[0].num_bytes == 3_000_012
    damaged = bytes([second[0] ^ 1]) + second[1:]
    for wrong in (damaged, second[:-1], b"rubbish"):
        with pytest.raises(DataError, match=rf"cannot decompress .*d.txt{compressed}: \w"):
            load_file(tmp_path / f"d.txt{compressed}", first + wrong)


def test_an_xz_file_that_needs_gigabytes_of_memory_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 26}]
    content = lzma.compress(b"six sacks\n" * 30, filters=filters)
    assert load_file(tmp_path / "d.txt.xz", content).sources[0].num_bytes == 300
    largest = bytearray(content)
    largest[16] = 39  # code of a dictionary of 3 GiB in the header of the block, before its checksum
    largest[20:24] = zlib.crc32(largest[12:20]).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"cannot decompress .*e.txt.xz: it needs more than 1024 MiB of memory: dec"):
        load_file(tmp_path / "e.txt.xz", bytes(largest))


@pytest.mark.parametrize("compressed", list(DECOMPRESSORS))
def test_a_content_far_larger_than_its_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: str
) -> None:
    monkeypatch.setattr(compression, "MIN_LIMIT_BYTES", 1 << 20)
    with pytest.raises(
        DataError, match=r"the content of .* is larger than 1 MiB, 200 times its size: .*decompress the"
    ):
        load_file(tmp_path / f"d.txt{compressed}", COMPRESS[compressed](b"six sacks\n" * 300_000))
    assert not [path for path in (tmp_path / "cache" / "converted").iterdir() if path.is_dir()]


# JSON arrays


def elements(text: str, tmp_path: Path, chunk: int = CHUNK) -> list[Any]:
    chunks = (text.encode()[i : i + chunk] for i in range(0, len(text.encode()), chunk))
    return [json.loads(line) for line in array_to_lines(chunks, tmp_path)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@example(values=[1.5e-07], indent=None, chunk=3)
@given(values=st.lists(JSON, min_size=1, max_size=4), indent=st.sampled_from([None, 0, 2]), chunk=st.integers(1, 40))
def test_the_elements_of_any_array_are_read_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, chunk: int
) -> None:
    for ascii in (True, False):
        text = f" \n{json.dumps(values, indent=indent, ensure_ascii=ascii)}\n "
        assert elements(text, Path("x"), chunk) == values


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2", "element 2: expected a comma or the end of the array, received ''"),
        ("[1 2]", "element 1: expected a comma or the end of the array, received '2'"),
        ("[1,]", "element 2: not JSON: Expecting value"),
        ("[,1]", "element 1: not JSON: Expecting value"),
        ('[{"a": 1}, {"b" 2}]' + " " * 40, "element 2: not JSON: Expecting ':' delimiter"),
        ('["abc', "element 1: not JSON: Unterminated string"),
        ("[1] 2", "element 1: expected the end of the file after the array, received '2'"),
        ("[" + "[" * 100_000, "element 1: not JSON that can be read"),
        ("[" + "1" * 10_000 + "]", "element 1: not JSON that can be read"),
        ("[]", "is an empty array: expected at least one element"),
    ],
)
def test_what_is_not_an_array_is_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        elements(text, tmp_path)


def test_an_element_that_is_no_object_is_an_invalid_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d.json, element 2: expected a JSON object, received int"):
        load_file(tmp_path / "d.json", b'[{"text": "a b c"}, 3]')


def test_an_element_has_a_maximum_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 1 << 18)
    with pytest.raises(DataError, match="element 2: longer than 0 MiB"):
        elements(f'[1, "{"x" * (1 << 20)}"]', tmp_path, 1 << 16)


@pytest.mark.parametrize("text", ["[" + " " * (1 << 25) + "1]", "[" + "1," * 300_000 + "1]"])
def test_the_time_to_read_an_array_is_linear(tmp_path: Path, text: str) -> None:
    began = time.process_time()
    content = text.encode()
    chunks = (content[i : i + (1 << 20)] for i in range(0, len(content), 1 << 20))
    assert set(array_to_lines(chunks, tmp_path)) == {b"1\n"}
    assert time.process_time() - began < 2


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    assert load_file(tmp_path / "d.json", json_lines(ROWS)).train[0].name == "d.json:1#0"
    for content in (json.dumps({"data": ROWS}, indent=1).encode(), b"{\n}"):
        with pytest.raises(DataError, match=r"d.json is neither an array of JSON objects nor one JSON object per line"):
            load_file(tmp_path / "d.json", content)
    with pytest.raises(DataError, match=r"of no record format; it has data, .*'data' is a list.*write this list alone"):
        load_file(tmp_path / "d.json", json.dumps({"data": ROWS}).encode())


def test_an_object_on_several_lines_is_an_error_with_the_position(tmp_path: Path) -> None:
    reason = r"d.jsonl, line 1: expected a JSON object on one line, received '\{' \(Expecting .* at character 3\)"
    with pytest.raises(DataError, match=reason):
        load_file(tmp_path / "d.jsonl", json.dumps(ROWS[0], indent=1).encode())


# CSV


def csv_corpus(tmp_path: Path, content: str, **data: Any) -> Corpus:
    (tmp_path / "d.csv").write_bytes(content.encode())
    return load({"files": [str(tmp_path / "d.csv")]}, **data)


def test_values_of_csv_are_strings_and_may_contain_line_breaks(tmp_path: Path) -> None:
    corpus = csv_corpus(tmp_path, 'id,text\r\n1,007\r\n\r\n2,"a\nb, ""c"""\r\n3,' + "x y " * 50_000)
    assert [s.text for s in corpus.train[:2]] == ["007", 'a\nb, "c"']
    assert [s.name.partition("#")[0] for s in (corpus.train[0], corpus.train[1], corpus.train[-1])] == [
        "d.csv:1", "d.csv:2", "d.csv:3"
    ]  # fmt: skip


def test_rows_of_another_length_are_invalid_records(tmp_path: Path) -> None:
    corpus = csv_corpus(tmp_path, "id,text\n1\n2,a b c\n3,a,b\n", max_invalid=2)
    assert [message.partition("row ")[2] for message in corpus.sources[0].first_invalid] == [
        "1: 'text' is missing, expected a string",
        "3: expected 2 values as in the first row, received 3",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text\n", "has no row after the names of its columns"),
        ("text,text\na,b\n", "its first row, which names the columns, has 'text' more than once"),
        ('text\n"a', "line 2: unexpected end of data"),
        ('text\n"a"b\n', "line 2: "),
        ("body;kind\na;b\n", "has one name, 'body;kind': expected names separated by commas, received semicolons"),
        (",, \na,b,c\n", "its first row, which names the columns, has no name"),
        ("text,kind\ra,b\rc,d\r", "line 1: a carriage return without a line feed, expected lines that end with a line"),
        (f"text,{'x' * 256}\na,b\n", "has a name of 256 characters, expected at most 255"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        csv_corpus(tmp_path, content)


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    corpus = csv_corpus(tmp_path, ',question,answer,, \n0,"How heavy?",14.5 kg,,\n1,"How old?",seven,x,y\n')
    assert corpus.sources[0].format == "chats: columns question, answer"
    assert [sample.messages[1]["content"] for sample in corpus.train] == ["14.5 kg", "seven"]
    with pytest.raises(DataError, match=r"row 1: expected 3 values as in the first row, received 4"):
        csv_corpus(tmp_path, "question,answer,\na,b,c,d\n")


@pytest.mark.parametrize(
    ("suffix", "char", "received"),
    [(".csv", ";", "semicolons"), (".csv", "\t", "tabs"), (".csv", "|", "vertical bars"), (".tsv", ",", "commas")],
)
def test_names_of_columns_with_another_delimiter_are_an_error(
    tmp_path: Path, suffix: str, char: str, received: str
) -> None:
    expected = "tabs" if suffix == ".tsv" else "commas"
    with pytest.raises(DataError, match=f"expected names separated by {expected}, received {received}: convert"):
        load_file(tmp_path / f"d{suffix}", delimited(ROWS, char))


def test_a_line_of_csv_has_a_maximum_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "MAX_LINE_BYTES", 1 << 10)
    chunks = (b"text\na\n" if n == 0 else b"x" * 100 for n in range(1000))
    with pytest.raises(
        DataError, match=r"d.csv, line 3 is longer than 0 MiB: end every row with a line feed, or store"
    ):
        list(csv_files.csv_to_lines(chunks, Path("d.csv")))


def test_the_time_to_read_the_names_of_columns_is_linear(tmp_path: Path) -> None:
    names = ["text", *(f"c{n}" for n in range(50_000))]
    began = time.process_time()
    with pytest.raises(DataError, match="'c0' more than once"):
        csv_corpus(tmp_path, ",".join([*names, "c0"]) + "\na,b\n")
    assert len(csv_corpus(tmp_path, ",".join(names) + "\nsix sacks" + ",1" * 50_000).train) == 1
    assert time.process_time() - began < 4


@given(
    rows=st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2), min_size=1, max_size=4),
    chunk=st.integers(1, 30),
)
def test_any_rows_of_csv_are_read_in_chunks_of_any_size(rows: list[list[str]], chunk: int) -> None:
    values = [dict(zip(("a", "b"), row, strict=True)) for row in rows]
    content = delimited(values, ",")
    chunks = (content[i : i + chunk] for i in range(0, len(content), chunk))
    assert [json.loads(line) for line in csv_files.csv_to_lines(chunks, Path("x"))] == values


# The converted copy


def test_a_file_is_converted_once_and_again_if_it_changes_or_its_copy_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    converted: list[Path] = []
    convert = csv_files.csv_to_lines

    def csv_to_lines(chunks: Any, path: Path) -> Any:
        converted.append(path)
        return convert(chunks, path)

    monkeypatch.setattr(csv_files, "csv_to_lines", csv_to_lines)
    path = tmp_path / "d.csv"
    for _ in range(2):
        path.exists() or path.write_bytes(CONTENT[".csv"])
        expected = list(load({"files": [str(path)]}).train)
    assert converted == [path]
    (folder,) = [each for each in (tmp_path / "cache" / "converted").iterdir() if each.is_dir()]
    for name in ("content", "origin.json", "manifest.json"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        assert list(load({"files": [str(path)]}).train) == expected
        assert f"the converted copy of {path} {folder} is built again: {name} is damaged" in caplog.text
    assert len(converted) == 4
    path.write_bytes(CONTENT[".csv"].replace(b"Sacks", b"Boxes"))
    assert "Boxes" in load({"files": [str(path)]}).train[0].text
    assert [each for each in (tmp_path / "cache" / "converted").iterdir() if each.is_dir()] == [folder]


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl.gz"])
def test_a_change_of_the_original_during_the_run_is_an_error(tmp_path: Path, name: str) -> None:
    content = {"d.csv": CONTENT[".csv"], "d.jsonl.gz": gzip.compress(CONTENT[".jsonl"])}[name]
    train = load_file(tmp_path / name, content).train
    assert train[0].text
    (tmp_path / name).write_bytes(content + b"\n")
    with pytest.raises(DataError, match=rf"{name} has changed during the run: expected {len(content)} bytes"):
        train[0]
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"cannot read .*{name}: No such file"):
        train[0]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data_file, "converted_dir", lambda: tmp_path / "file" / "converted")
    train = load_file(tmp_path / "d.csv", CONTENT[".csv"]).train
    assert train[0].text.startswith('0. "Sacks"')
    assert "the converted copy of " in caplog.text
    assert "(Not a directory): it is built for this start only; free disk space, or set" in caplog.text
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match="cannot write the converted copy of .* to the cache or to a temporary dir"):
        load_file(tmp_path / "e.csv", CONTENT[".csv"])


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A limit on the size of files has the same effect as a full disk."""
    import resource
    import signal

    path = tmp_path / "d.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(1 << 21).hex().encode()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            DataError, match=r"the content of .*d.txt.gz does not fit on the disk .*: free disk space, or"
        ):
            load({"files": [str(path)]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_every_format_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page.partition("## Record formats")[0], re.MULTILINE)
    suffixes = {name: [*resolve_name(target).suffixes] for name, target in SOURCES.items()}
    assert {name: re.findall(r"`(\.\w+)`", cell) for name, cell in rows} == suffixes
    for suffix in DECOMPRESSORS:
        assert f"`{suffix}`" in page
