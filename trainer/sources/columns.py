"""Conversion of one line or row into a document, by the columns that the config names."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainer.sources.base import DocumentRef, InvalidRecord
from trainer.sources.config import SourceConfig
from trainer.sources.windows import split_chunks


class Content(NamedTuple):
    """The content of a document and the values of its columns.

    content  UTF-8 of a text, or JSON of a chat's [messages, tools]; empty for an empty text or chat
    domain   value of the domain column; None without a column
    teacher  value of the teacher column; None without a column
    """

    content: bytes
    domain: str | None = None
    teacher: str | None = None


class InvalidRecordError(Exception):
    """A line or row that is not a document. The message gives the reason."""


def parse_json_line(line: bytes) -> Mapping[str, Any]:
    """Parse one line of a .jsonl file. Raises InvalidRecordError if it is not a JSON object."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise InvalidRecordError(describe_utf8_error(error, 0)) from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"expected a JSON object, received {text[:40].rstrip()!r}") from error
    if not isinstance(values, dict):
        raise InvalidRecordError(f"expected a JSON object, received {type(values).__name__}")
    return values


def parse_document(
    where: str, position: tuple[int, int, int], load_values: Callable[[], Mapping[str, Any]], config: SourceConfig
) -> DocumentRef | InvalidRecord | None:
    """Parse one line or row. Return None if its text or chat is empty.

    where        file and line or row, for the message of an InvalidRecord
    position     (offset, length, number) of the DocumentRef
    load_values  returns the columns; may raise InvalidRecordError
    """
    try:
        document = extract_content(load_values(), config)
    except InvalidRecordError as error:
        return InvalidRecord(f"{where}: {error}")
    if not document.content:
        return None
    # A chat is one window, so that it must stay in one chunk.
    chunks = [document.content] if config.messages_column else split_chunks(io.BytesIO(document.content).read)
    return DocumentRef(*position, chunks, document.domain, document.teacher)


def extract_content(values: Mapping[str, Any], config: SourceConfig) -> Content:
    """Extract the content and the named columns of a line or row. Raises InvalidRecordError."""
    if config.messages_column is None:
        content = _encode_utf8(_string(values, config.text_column))
    else:
        content = _encode_chat(values, config.messages_column)
    domain = _string(values, config.domain_column) if config.domain_column else None
    teacher = _string(values, config.teacher_column) if config.teacher_column else None
    for name in (domain, teacher):
        _encode_utf8(name or "")
    return Content(content, domain, teacher)


def _encode_chat(values: Mapping[str, Any], column: str) -> bytes:
    messages, tools = _objects(values, column), _objects(values, "tools") if values.get("tools") else []
    try:
        return _encode_utf8(json.dumps([messages, tools], ensure_ascii=False)) if messages else b""
    except TypeError as error:  # a row of a table can hold values that JSON cannot represent, for example dates
        raise InvalidRecordError(f"{column!r} cannot be written as JSON: {error}") from error


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        raise InvalidRecordError(f"{column!r} is {_type_name(value)}, expected a string")
    return value


def _objects(values: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    value = values.get(column)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidRecordError(f"{column!r} is {_type_name(value)}, expected a list of objects")
    return value


def _encode_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError(f"character {error.start} is half of a surrogate pair") from error


def describe_utf8_error(error: UnicodeDecodeError, begin: int) -> str:
    """Describe the first byte that is not UTF-8. `begin` is the file offset of the bytes that were decoded."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {begin + error.start}"


def _type_name(value: object) -> str:
    return "missing" if value is None else type(value).__name__
