"""Documents made of the records of a table, by the record format that fits its columns."""

import io
import json
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any, NamedTuple

from trainer.chats.json_values import InvalidChat
from trainer.errors import DataError
from trainer.sources.base import DocumentRef, EmptyRecord, FormatInfo, InvalidRecord, Table, TableRecord
from trainer.sources.config import SourceConfig
from trainer.sources.content_cache import MIN_BYTES, contents
from trainer.sources.record_formats import RECORD_FORMATS
from trainer.sources.record_formats.base import BoundFormat, ChatContent, InvalidRecordError, RecordFormat, string
from trainer.sources.windows import split_chunks

MAX_NAMED_COLUMNS, MAX_NAME_CHARS = 30, 40
MAX_WHOLE_BYTES = 1 << 23  # of a chat or a text with a prompt: 2 million tokens, whose tokenization takes 1 to 3 GB


class _Content(NamedTuple):
    """The bytes of a document, of which the first `prompt_bytes` are a masked prompt, and its labels."""

    content: bytes
    prompt_bytes: int
    domain: str | None
    teacher: str | None


class TableDocuments:
    """The records of a table as documents."""

    def __init__(self, table: Table, config: SourceConfig) -> None:
        self._config = config
        bound = self._bound = _bind(table, config)
        labels = [column for column in (config.domain_column, config.teacher_column) if column]
        self._check_columns(table, labels)
        used = [column for column in (*bound.columns, *labels, *bound.optional) if column in table.columns]
        self.format = FormatInfo(bound.describe(table.columns), bound.is_chat, bound.is_chat or bound.has_prompt)
        self._table = table.select(list(dict.fromkeys(used)))

    def _check_columns(self, table: Table, labels: list[str]) -> None:
        for column in (*self._bound.columns, *labels) if table.columns else ():
            if column not in table.columns:
                raise DataError(f"{table.where} has no column {column!r}; {_has(table)}")
        if "loss_mask" in table.columns and not self._bound.is_chat:
            raise DataError(
                f"{table.where} has a column 'loss_mask', which tells for the messages of a chat whether they are "
                f"supervised, but its records are {self._bound.kind}: remove or rename the column"
            )

    @property
    def name(self) -> str:
        return self._table.name

    @property
    def identity(self) -> tuple[object, ...]:
        return (*self._table.identity, self._bound.name, self._bound.kind)

    def scan(self) -> Iterator[DocumentRef | InvalidRecord | EmptyRecord]:
        for record in self._table.scan():
            yield self._document(record)

    def _document(self, record: TableRecord) -> DocumentRef | InvalidRecord | EmptyRecord:
        try:
            document = self._extract(record.load())
        except InvalidRecordError as error:
            return self._invalid(record, str(error))
        if not document.content:
            return EmptyRecord()
        if self.format.is_whole and (num_bytes := len(document.content)) > MAX_WHOLE_BYTES:
            return self._invalid(
                record,
                f"the {'chat' if self.format.is_chat else 'prompt with its completion'} has {num_bytes:,} bytes, "
                f"expected at most {MAX_WHOLE_BYTES:,}: shorten or remove it",
            )
        # A chat, and a text with a prompt, is one window, so that it must stay in one chunk.
        chunks = [document.content] if self.format.is_whole else split_chunks(io.BytesIO(document.content).read)
        labels = document.domain, document.teacher
        return DocumentRef(*record[:3], chunks, *labels, document.prompt_bytes)

    def _invalid(self, record: TableRecord, reason: str) -> InvalidRecord:
        return InvalidRecord(f"{self._table.where}, {self._table.unit} {record.number}: {reason}")

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        def load() -> bytes:
            return self._extract(self._table.load(offset, length)).content

        self._table.check()  # also where the content is kept
        content = load() if 0 < length < MIN_BYTES else contents.get((self, offset), load)
        return content[begin:end]

    def _extract(self, values: Mapping[str, Any]) -> _Content:
        config = self._config
        try:
            parsed = self._bound.parse(values)
        except InvalidChat as error:
            raise InvalidRecordError(str(error)) from error
        domain = string(values, config.domain_column) if config.domain_column else None
        teacher = string(values, config.teacher_column) if config.teacher_column else None
        for name in (domain, teacher):
            _encode(name or "")
        if isinstance(parsed, ChatContent):
            return _Content(_encode_chat(parsed), 0, domain, teacher)
        prompt_bytes = len(_encode(parsed.text[: parsed.prompt_chars]))
        return _Content(_encode(parsed.text), prompt_bytes, domain, teacher)


def _encode_chat(parsed: ChatContent) -> bytes:
    try:
        chat = json.dumps([parsed.messages, parsed.tools], ensure_ascii=False) if parsed.messages else ""
    except (TypeError, ValueError, RecursionError) as error:  # rows can hold values that JSON has not, such as dates
        raise InvalidRecordError(f"the chat cannot be written as JSON: {error}") from error
    return _encode(chat)


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError(f"character {error.start} is half of a surrogate pair") from error


def _bind(table: Table, config: SourceConfig) -> BoundFormat:
    """Return the record format that the config names, or else the one whose columns the table has.

    Raises DataError if none or several formats fit.
    """
    formats: dict[str, RecordFormat] = {name: resolve_name(target)() for name, target in RECORD_FORMATS.items()}
    name = config.record_format or _implied_format(config) or _detect(table, config, formats)
    return formats[name].bind(config, lambda column: table.example(column) if column in table.columns else None)


def _advice_on_lists(table: Table) -> str:
    """Return advice if a column has lists of objects: a chat under another name, or all records of the file."""
    for column in table.columns:
        value = table.example(column)
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return (
                f'; {column!r} is a list of objects: set messages_column = "{column}" if they are the messages of a '
                "chat; if they are the records, write this list alone into the file"
            )
    return ""


def _implied_format(config: SourceConfig) -> str | None:
    """Return the format whose key the config sets."""
    keys = {"text": config.text_column, "messages": config.messages_column, "template": config.template}
    return next((name for name, value in keys.items() if value is not None), None)


def _detect(table: Table, config: SourceConfig, formats: Mapping[str, RecordFormat]) -> str:
    if not table.columns:  # no record can be read; the records are counted and named when they are indexed
        return "text"
    columns = {name: each.columns(config) for name, each in formats.items()}
    fitting = [name for name, needed in columns.items() if needed and set(needed) <= set(table.columns)]
    if len(fitting) == 1:
        return fitting[0]
    has = _has(table)
    if not fitting:
        known = "; ".join(f"{' and '.join(needed)} ({name})" for name, needed in columns.items() if needed)
        raise DataError(
            f"{table.where} has the columns of no record format; {has}, and the formats have {known}: set text_column, "
            f"messages_column or [data.sources.template]{_advice_on_lists(table)}"
        )
    choices = " and ".join(f"{name} (columns {', '.join(columns[name])})" for name in fitting)
    raise DataError(
        f'{table.where} has the columns of the record formats {choices}; {has}: set record_format = "{fitting[0]}" or '
        f'"{fitting[1]}" in its source'
    )


def _has(table: Table) -> str:
    """Return "it has" and the columns of a table, of which a JSON file can have any number and length."""
    names = [name if len(name) <= MAX_NAME_CHARS else f"{name[:MAX_NAME_CHARS]}…" for name in table.columns]
    more = f" and {len(names) - MAX_NAMED_COLUMNS} others" if len(names) > MAX_NAMED_COLUMNS else ""
    return f"it has {', '.join(names[:MAX_NAMED_COLUMNS])}{more}"
