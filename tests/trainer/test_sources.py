"""What documents are in text and .jsonl files: found in one pass, read again by where they stand."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import SourceConfig
from trainer.data.sources import Broken, Documents, open_file
from trainer.data.windows import STRETCH_BYTES
from trainer.errors import DataError


def opened(path: Path, **columns: Any) -> Documents:
    return open_file(path, SourceConfig(files=[str(path)], **columns))


def written(folder: Path, content: bytes, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def found(documents: Documents) -> list[tuple[int, str]]:
    """Line and text of each document, read a second time; broken lines as (-1, sentence)."""
    out = []
    for one in documents.scan():
        if isinstance(one, Broken):
            out.append((-1, one.sentence))
            continue
        content = b"".join(one.stretches)
        assert documents.read(one.place, one.length, 0, len(content)) == content
        assert documents.read(one.place, one.length, 1, len(content) - 1) == content[1:-1]
        out.append((one.number, content.decode()))
    return out


def lines(*texts: str) -> list[bytes]:
    return [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]


def test_lines_are_documents_whatever_ends_them(tmp_path: Path) -> None:
    one, two, three, empty = lines("one", "two é日😀", "three", "")
    content = one + b"\r\n" + b"\n  \r\n" + two + b"\n" + empty + b"\n" + three
    assert found(opened(written(tmp_path, content))) == [(1, "one"), (4, "two é日😀"), (6, "three")]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6), ascii=st.booleans())
def test_any_texts_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii: bool) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii) + "\n" for text in ["first", *texts]).encode()
    documents = opened(written(tmp_path_factory.mktemp("texts"), content))
    assert found(documents) == [(n, text) for n, text in enumerate(["first", *texts], 1) if text]


def test_line_separators_inside_a_document_do_not_end_its_line(tmp_path: Path) -> None:
    text = "one\u2028two\x0bthree"
    assert found(opened(written(tmp_path, lines(text)[0]))) == [(1, text)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"not json", "expected a JSON object, received 'not json'"),
        (b"[1]", "expected a JSON object, received list"),
        (b'"text"', "expected a JSON object, received str"),
        (b"[" * 100_000, "expected a JSON object, received"),
        (b'{"body": "x"}', "'text' is absent, expected a string"),
        (b'{"text": 3}', "'text' is int, expected a string"),
        (b'{"text": "ab\\ud83d"}', "character 2 is half of a surrogate pair"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at 13"),
    ],
)
def test_broken_lines_are_named_and_the_others_read(tmp_path: Path, line: bytes, says: str) -> None:
    before, after = lines("before", "after")
    path = written(tmp_path, b"\n".join([before, line, after]) + b"\n")
    seen = found(opened(path))
    assert [text for number, text in seen if number > 0] == ["before", "after"]
    (sentence,) = [text for number, text in seen if number < 0]
    assert sentence.startswith(f"{path}, line 2: {says}")


def test_columns_name_domain_teacher_and_chat(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "é"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    rows = [{"chat": chat, "tools": [{"name": "f"}], "of": "d", "by": "t"}, {"chat": [], "of": "d", "by": "t"}]
    path = written(tmp_path, "\n".join(json.dumps(row) for row in [*rows, {"chat": chat, "of": "d"}]).encode())
    documents = opened(path, messages_column="chat", domain_column="of", teacher_column="by")
    one, broken = documents.scan()
    assert not isinstance(one, Broken)
    assert (one.domain, one.teacher) == ("d", "t")
    assert json.loads(b"".join(one.stretches)) == [chat, [{"name": "f"}]]
    assert broken == Broken(f"{path}, line 3: 'by' is absent, expected a string")


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    path = written(tmp_path, b"text", "d.txt")
    for column in ("messages_column", "domain_column", "teacher_column"):
        with pytest.raises(DataError, match="d.txt has no columns"):
            opened(path, **{column: "x"})


@pytest.mark.parametrize("end", ["\r\n", "\n", ""])
def test_a_text_file_is_read_in_stretches_cut_between_characters(tmp_path: Path, end: str) -> None:
    text = "".join(f"{n} sacks of 日本語 and 😀{end}" for n in range(40_000))
    documents = opened(written(tmp_path, text.encode(), "d.txt"))
    (one,) = documents.scan()
    assert not isinstance(one, Broken)
    parts = list(one.stretches)
    assert len(parts) > 4
    assert max(map(len, parts)) <= STRETCH_BYTES
    assert "".join(part.decode() for part in parts) == text
    assert documents.read(0, 0, len(parts[0]), len(parts[0]) + 9) == text.encode()[len(parts[0]) :][:9]


def test_a_text_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    before = b"x" * (STRETCH_BYTES + 7)
    (one,) = opened(written(tmp_path, before + b"caf\xe9 au lait", "latin.txt")).scan()
    assert not isinstance(one, Broken)
    with pytest.raises(DataError, match=rf"latin.txt is not UTF-8: byte 0xe9 at {len(before) + 3}"):
        list(one.stretches)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty.txt is empty: give a text of at least one byte"):
        opened(written(tmp_path, b"", "empty.txt"))
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Is a directory"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_a_file_that_changes_is_an_error_and_never_another_text(tmp_path: Path, name: str) -> None:
    content = lines("one" * 9)[0] + b"\n"
    path = written(tmp_path, content, name)
    documents = opened(path)
    (one,) = documents.scan()
    assert not isinstance(one, Broken)
    list(one.stretches)
    path.write_bytes(content.replace(b"one", b"two"))
    with pytest.raises(DataError, match=f"{name} has changed while the run goes on: expected {len(content)} bytes"):
        documents.read(one.place, one.length, 0, 5)
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read .*{name}: No such file"):
        documents.read(one.place, one.length, 0, 5)


def test_a_line_without_an_end_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.sources.LONGEST_LINE_BYTES", 1 << 20)
    path = written(tmp_path, lines("one")[0] + b"\n" + b"x" * (1 << 21))
    with pytest.raises(DataError, match="d.jsonl, line 2 is longer than 1 MiB"):
        list(opened(path).scan())
