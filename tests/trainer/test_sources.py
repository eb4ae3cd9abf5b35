"""Text files and JSON lines: scanned once, read again by position; and the registry of sources."""

import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_vocabulary
from trainer.errors import ConfigError, DataError
from trainer.evaluation.config import EvalConfig
from trainer.sources import SOURCES
from trainer.sources.base import DocumentRef, Documents, EmptyRecord, InvalidRecord
from trainer.sources.config import DataConfig, SourceConfig
from trainer.sources.content_cache import MIN_BYTES, ContentCache
from trainer.sources.corpus import load_corpus
from trainer.sources.data_file import open_data_file
from trainer.sources.formats import format_of, open_documents
from trainer.sources.input_files import find_inputs
from trainer.sources.json_lines import JsonLinesTable
from trainer.sources.table_documents import TableDocuments
from trainer.sources.windows import CHUNK_BYTES


def open_path(path: Path, **columns: Any) -> Documents:
    return open_documents(path, SourceConfig(files=[str(path)], **columns))


def write_file(folder: Path, content: bytes, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def records_of(documents: Documents) -> list[tuple[int, str]]:
    """Return line number and text of each document, read by position; invalid lines as (-1, message)."""
    out = []
    for one in documents.scan():
        if isinstance(one, InvalidRecord):
            out.append((-1, one.message))
        if not isinstance(one, DocumentRef):
            continue
        content = b"".join(one.chunks)
        assert documents.read(one.offset, one.length, 0, len(content)) == content
        assert documents.read(one.offset, one.length, 1, len(content) - 1) == content[1:-1]
        out.append((one.number, content.decode()))
    return out


def lines(*texts: str) -> list[bytes]:
    return [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]


def test_each_line_is_a_document_for_every_line_end(tmp_path: Path) -> None:
    one, two, three, empty = lines("one", "two é日😀", "three", "")
    content = one + b"\r\n" + b"\n  \r\n" + two + b"\n" + empty + b"\n" + three
    assert records_of(open_path(write_file(tmp_path, content))) == [(1, "one"), (4, "two é日😀"), (6, "three")]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6), ascii=st.booleans())
def test_any_texts_are_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii: bool
) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii) + "\n" for text in ["first", *texts]).encode()
    documents = open_path(write_file(tmp_path_factory.mktemp("texts"), content))
    assert records_of(documents) == [(n, text) for n, text in enumerate(["first", *texts], 1) if text]


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\x0bthree"
    assert records_of(open_path(write_file(tmp_path, lines(text)[0]))) == [(1, text)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"not json", "expected a JSON object, received 'not json'"),
        (b"[1]", "expected a JSON object, received list"),
        (b'"text"', "expected a JSON object, received str"),
        (b"[" * 100_000, "expected a JSON object, received"),
        (b'{"body": "x"}', "'text' is missing, expected a string"),
        (b'{"text": 3}', "'text' is int, expected a string"),
        (b'{"text": "ab\\ud83d"}', "character 2 is half of a surrogate pair"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at 13"),
    ],
)
def test_invalid_lines_are_reported_and_the_others_read(tmp_path: Path, line: bytes, expected: str) -> None:
    before, after = lines("before", "after")
    path = write_file(tmp_path, b"\n".join([before, line, after]) + b"\n")
    seen = records_of(open_path(path))
    assert [text for number, text in seen if number > 0] == ["before", "after"]
    (message,) = [text for number, text in seen if number < 0]
    assert message.startswith(f"{path}, line 2: {expected}")


def test_columns_give_domain_teacher_and_chat(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "ok"}]
    rows = [{"chat": chat, "tools": [{"name": "f"}], "of": "d", "by": "t"}, {"chat": [], "of": "d", "by": "t"}]
    path = write_file(tmp_path, "\n".join(json.dumps(row) for row in [*rows, {"chat": chat, "of": "d"}]).encode())
    documents = open_path(path, messages_column="chat", domain_column="of", teacher_column="by")
    one, empty, invalid = documents.scan()
    assert isinstance(one, DocumentRef)
    assert (one.domain, one.teacher) == ("d", "t")
    assert json.loads(b"".join(one.chunks)) == [chat, [{"type": "function", "function": {"name": "f"}}]]
    assert empty == EmptyRecord()
    assert invalid == InvalidRecord(f"{path}, line 3: 'by' is missing, expected a string")


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    path = write_file(tmp_path, b"text", "d.txt")
    for column in ("messages_column", "text_column", "domain_column", "teacher_column"):
        with pytest.raises(DataError, match=rf"d.txt is a text and has no columns: .* without {column}$"):
            open_path(path, **{column: "x"})


@pytest.mark.parametrize("end", ["\r\n", "\n", ""])
def test_a_text_file_is_read_in_chunks_cut_between_characters(tmp_path: Path, end: str) -> None:
    text = "".join(f"{n} sacks of 日本語 and 😀{end}" for n in range(40_000))
    documents = open_path(write_file(tmp_path, text.encode(), "d.txt"))
    (one,) = documents.scan()
    assert isinstance(one, DocumentRef)
    chunks = list(one.chunks)
    assert len(chunks) > 4
    assert max(map(len, chunks)) <= CHUNK_BYTES
    assert "".join(chunk.decode() for chunk in chunks) == text
    assert documents.read(0, 0, len(chunks[0]), len(chunks[0]) + 9) == text.encode()[len(chunks[0]) :][:9]


def test_a_text_file_that_is_not_utf8_is_an_error_with_the_offset(tmp_path: Path) -> None:
    before = b"x" * (CHUNK_BYTES + 7)
    (one,) = open_path(write_file(tmp_path, before + b"caf\xe9 au lait", "latin.txt")).scan()
    assert isinstance(one, DocumentRef)
    with pytest.raises(DataError, match=rf"latin.txt is not UTF-8: byte 0xe9 at {len(before) + 3}"):
        list(one.chunks)


def test_files_that_cannot_be_read_are_errors_with_their_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty.txt is empty: expected a file of at least one byte"):
        open_path(write_file(tmp_path, b"", "empty.txt"))
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Is a directory"):
        open_path(tmp_path, file_format="text")


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_a_changed_file_is_an_error(tmp_path: Path, name: str) -> None:
    content = lines("one" * 9)[0] + b"\n"
    path = write_file(tmp_path, content, name)
    documents = open_path(path)
    (one,) = documents.scan()
    assert isinstance(one, DocumentRef)
    list(one.chunks)
    path.write_bytes(content.replace(b"one", b"two"))
    with pytest.raises(DataError, match=f"{name} has changed during the run: expected {len(content)} bytes"):
        documents.read(one.offset, one.length, 0, 5)
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read .*{name}: No such file"):
        documents.read(one.offset, one.length, 0, 5)


def test_a_line_above_the_maximum_length_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.sources.json_lines.MAX_LINE_BYTES", 1 << 20)
    path = write_file(tmp_path, lines("one")[0] + b"\n" + b"x" * (1 << 21))
    with pytest.raises(DataError, match="d.jsonl, line 2 is longer than 1 MiB"):
        list(open_path(path).scan())


# The registry


class ColonSource:
    """A format that a plugin could add: one document per line, with the kind before a colon."""

    suffixes = (".colon",)

    def open(self, path: Path, config: SourceConfig) -> Documents:
        return TableDocuments(JsonLinesTable(open_data_file(path, colon_to_lines)), config)


def colon_to_lines(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    for line in b"".join(chunks).decode().splitlines():
        yield json.dumps(dict(zip(("kind", "text"), line.split(":"), strict=True))).encode() + b"\n"


def test_one_registry_line_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "colon", f"{__name__}:ColonSource")
    path = write_file(tmp_path, b"a:six sacks\nb:\na:two bells\n", "d.colon")
    config = DataConfig(sources=[SourceConfig(files=[str(path)], domain_column="kind")])
    corpus = load_corpus(config, EvalConfig(), tiny_vocabulary("byte_level"), seed=0)
    assert [(s.name, s.text, s.domain) for s in corpus.train] == [
        ("d.colon:1#0", "six sacks", "a"),
        ("d.colon:3#0", "two bells", "a"),
    ]
    assert corpus.sources[0].empty == 1


def test_the_suffixes_of_formats_are_distinct_and_upper_case_is_accepted() -> None:
    suffixes = [suffix for target in SOURCES.values() for suffix in resolve_name(target).suffixes]
    assert len({*suffixes}) == len(suffixes)
    assert {format_of(Path(f"d{suffix.upper()}")) for suffix in suffixes} == {*SOURCES} - {"dataset"}
    assert format_of(Path("d.jsonl.GZ")) == format_of(Path("d.jsonl")) == "json"
    assert format_of(Path("d.gz")) is None


@pytest.mark.parametrize("name", ["d", "d.log", "d.gz", "d.log.xz", ".jsonl"])
def test_a_file_of_an_unknown_suffix_is_read_if_the_run_file_names_its_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"its suffix names no format; the suffixes are \.txt .*\.xz: rename the"):
        open_path(write_file(tmp_path, b"{}", name))
    content = b'{"text": "six sacks"}'
    compressed = gzip.compress(content) if name.endswith(".gz") else content
    path = write_file(tmp_path, lzma.compress(content) if name.endswith(".xz") else compressed, name)
    (one,) = open_path(path, file_format="text").scan()
    assert isinstance(one, DocumentRef)
    assert b"".join(one.chunks) == content
    assert records_of(open_path(path, file_format="json")) == [(1, "six sacks")]


def test_text_files_are_opened_without_the_libraries_of_tables(tmp_path: Path) -> None:
    path = write_file(tmp_path, b"text", "d.txt")
    code = (
        "import sys\nfrom pathlib import Path\nfrom trainer.sources.config import SourceConfig\n"
        "from trainer.sources.formats import open_documents\n"
        f"open_documents(Path({str(path)!r}), SourceConfig(files=[{str(path)!r}]))\n"
        "print([name for name in ('pyarrow.parquet', 'datasets', 'torch') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def found(*names: str, **source: Any) -> list[str]:
    config = SourceConfig.model_validate({"files": list(names)} | source)
    return [path.name for path in find_inputs([config])[0].paths]


def test_patterns_follow_no_links_to_directories_and_match_no_hidden_names(tmp_path: Path) -> None:
    for name in ("x.jsonl", "sub/y.jsonl", "sub/deep/z.jsonl", ".hidden/no.jsonl", "sub/.no.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert found(f"{tmp_path}/**/*.jsonl") == ["z.jsonl", "y.jsonl", "x.jsonl"]  # sorted by path
    assert found(f"{tmp_path}/**") == ["z.jsonl", "y.jsonl", "x.jsonl"]
    assert found(f"{tmp_path}/s*/?.jsonl") == ["y.jsonl"]
    with pytest.raises(ConfigError, match="matches no file"):
        found(f"{tmp_path}/none/**/*.jsonl")


@pytest.mark.parametrize("name", ["pipe", "p*", "socket", "folder", "/dev/zero", "/dev/stdin", "broken*"])
def test_only_regular_files_are_read_and_nothing_waits_for_a_pipe(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(
            DataError, match=r"expected a regular file|folder is a directory: list its files|cannot read .*broken"
        ):
            found(str(tmp_path / name))


def test_a_file_that_becomes_a_pipe_is_an_error(tmp_path: Path) -> None:
    path = write_file(tmp_path, b"\n".join(lines("one")))
    documents = open_path(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        documents.read(0, 10, 0, 1)


def test_a_file_of_several_names_is_read_once_and_named_twice(tmp_path: Path) -> None:
    path = write_file(tmp_path, b"\n".join(lines("one one", "two two")))
    (tmp_path / "link.jsonl").symlink_to(path)
    os.link(path, tmp_path / "same.jsonl")
    names = [path.name, "link.jsonl", "same.jsonl", path.name]
    first, second = [SourceConfig(files=[str(tmp_path / name) for name in part]) for part in (names[:2], names[2:])]
    (inputs,) = find_inputs([first, second])
    assert inputs.paths == (path,)
    assert inputs.repeated == tuple(f"{tmp_path / name} is {path}, which is read once" for name in names[1:])


def test_a_long_line_is_parsed_once_for_all_of_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The harbour office opened at six. " * 30_000
    documents = open_path(write_file(tmp_path, b"\n".join(lines(text, "short", text[1:]))))
    refs = [one for one in documents.scan() if isinstance(one, DocumentRef)]
    parsed: list[int] = []
    load = JsonLinesTable.load

    def counted(self: JsonLinesTable, offset: int, length: int) -> Mapping[str, Any]:
        parsed.append(length)
        return load(self, offset, length)

    monkeypatch.setattr(JsonLinesTable, "load", counted)
    content = text.encode()
    with ThreadPoolExecutor(4) as pool:
        parts = list(
            pool.map(lambda i: documents.read(refs[0].offset, refs[0].length, i, i + 100), range(0, 10**6, 9999))
        )
    assert parts == [content[i : i + 100] for i in range(0, 10**6, 9999)]
    assert len(parsed) == 1
    assert documents.read(refs[2].offset, refs[2].length, 0, 5) == content[1:6]


def test_the_memory_of_kept_contents_is_bounded() -> None:
    cache, loaded = ContentCache(max_bytes=5 * MIN_BYTES), list[int]()

    def get(key: int, size: int = 2 * MIN_BYTES) -> bytes:
        def load() -> bytes:
            loaded.append(key)
            return bytes(size)

        return cache.get(key, load)

    for key in (1, 2, 1, 3, 1, 2):
        assert len(get(key)) == 2 * MIN_BYTES
    assert loaded == [1, 2, 3, 2]  # 2 was used least recently when 3 came
    get(4, size=9 * MIN_BYTES)
    get(4)
    assert loaded == [1, 2, 3, 2, 4]
