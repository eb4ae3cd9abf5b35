"""The protocol of a record format, and the values that it reads from the columns of a record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from trainer.chats.json_values import InvalidChat, Message
from trainer.chats.messages import ChatOptions, normalize_chat
from trainer.sources.config import SourceConfig

Values = Mapping[str, Any]
MEDIA_COLUMNS = ("images", "videos", "audios")


class InvalidRecordError(Exception):
    """A line or row that is not a document. The message gives the reason."""


class TextContent(NamedTuple):
    """A text. The first `prompt_chars` characters are a prompt, which is not supervised."""

    text: str
    prompt_chars: int = 0


class ChatContent(NamedTuple):
    """A chat in the form of trainer/chats/messages.py."""

    messages: Sequence[Message]
    tools: Sequence[Message]


Kind = Literal["texts", "texts with a masked prompt", "chats"]


@dataclass(frozen=True)
class BoundFormat:
    """A record format with the columns of one source.

    name      name in the registry
    kind      what its documents are
    columns   columns that every record has
    optional  columns that are read where they exist
    parse     returns the content of a record. Raises InvalidRecordError or InvalidChat
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    parse: Callable[[Values], TextContent | ChatContent]
    optional: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        return self.kind == "chats"

    @property
    def has_prompt(self) -> bool:
        return self.kind == "texts with a masked prompt"

    def describe(self, available: Sequence[str]) -> str:
        """Return kind and columns, for example "chats: column messages"."""
        columns = [*self.columns, *(column for column in self.optional if column in available)]
        return f"{self.kind}: column{'s' * (len(columns) > 1)} {', '.join(columns)}"


class RecordFormat(Protocol):
    """One way to write texts or chats in columns. The first sentence of the docstring describes it."""

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        """Return the columns that a source of this format has; empty if the config does not allow the format."""

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        """Return the format for one source. `example` returns the first value of a column that is not null."""


def string(values: Values, column: str) -> str:
    """Return a string. Raises InvalidRecordError for another type."""
    value = values.get(column)
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise InvalidRecordError(f"{column!r} is {found}, expected a string")
    return value


def optional_string(values: Values, column: str) -> str:
    """Return a string; "" if the column is missing or null."""
    return "" if values.get(column) is None else string(values, column)


def prompted_text(prompt: str, completion: str) -> TextContent:
    """Return a text with a masked prompt. Raises InvalidRecordError if nothing follows the prompt."""
    if not completion:
        raise InvalidRecordError("the completion is empty, expected the text to train on")
    return TextContent(prompt + completion, len(prompt))


CHAT_COLUMNS = ("tools", "loss_mask", *MEDIA_COLUMNS)
"""Columns that every format of chats reads where they exist."""


def chat(messages: object, values: Values, config: SourceConfig, num_prompt: int = 0) -> ChatContent:
    """Return the chat of a record: its messages, and the columns of CHAT_COLUMNS.

    num_prompt  number of leading messages that are not supervised
    """
    options = ChatOptions(config.message_roles, config.other_parts == "drop")
    media = next((column for column in MEDIA_COLUMNS if values.get(column)), None)
    if media and not options.drops_other_parts:
        raise InvalidChat(
            f'it has {media}; text is used only: remove the record, or set other_parts = "drop" in its source to use '
            "the text alone"
        )
    return ChatContent(*normalize_chat(messages, values.get("tools"), values.get("loss_mask"), options, num_prompt))


def turn(role: str, content: str) -> Message:
    """Return one message."""
    return {"role": role, "content": content}
