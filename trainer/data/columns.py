"""What one line or row says, by the columns that the run file names.

Its content is bytes: of a text the UTF-8, of a chat the JSON of [messages, tools].
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config import SourceConfig


class Content(NamedTuple):
    """What a document says; no bytes for an empty text or chat; `domain` and `teacher` where columns name them."""

    content: bytes
    domain: str | None = None
    teacher: str | None = None


class BrokenError(Exception):
    """Why a line or row is no document."""


def parsed(line: bytes) -> Mapping[str, Any]:
    """The columns of a line of JSON. Raises BrokenError."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BrokenError(not_utf8(error, 0)) from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenError(f"expected a JSON object, received {text[:40].rstrip()!r}") from error
    if not isinstance(values, dict):
        raise BrokenError(f"expected a JSON object, received {type(values).__name__}")
    return values


def content_of(values: Mapping[str, Any], columns: SourceConfig) -> Content:
    """What a line or row says; no bytes for an empty text or chat. Raises BrokenError."""
    if columns.messages_column is None:
        content = _utf8(_string(values, columns.text_column))
    else:
        content = _chat(values, columns.messages_column)
    domain = _string(values, columns.domain_column) if columns.domain_column else None
    teacher = _string(values, columns.teacher_column) if columns.teacher_column else None
    for name in (domain, teacher):
        _utf8(name or "")
    return Content(content, domain, teacher)


def _chat(values: Mapping[str, Any], column: str) -> bytes:
    messages, tools = _objects(values, column), _objects(values, "tools") if values.get("tools") else []
    try:
        return _utf8(json.dumps([messages, tools], ensure_ascii=False)) if messages else b""
    except TypeError as error:  # a row of a table may hold what JSON has not
        raise BrokenError(f"{column!r} is no chat: {error}") from error


def _string(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        raise BrokenError(f"{column!r} is {_kind(value)}, expected a string")
    return value


def _objects(values: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    value = values.get(column)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BrokenError(f"{column!r} is {_kind(value)}, expected a list of objects")
    return value


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BrokenError(f"character {error.start} is half of a surrogate pair") from error


def not_utf8(error: UnicodeDecodeError, begin: int) -> str:
    """Where in a file it is not, if what was decoded begins at a byte of it."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {begin + error.start}"


def _kind(value: object) -> str:
    return "absent" if value is None else type(value).__name__
