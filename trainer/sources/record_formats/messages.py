"""Record formats `messages` and `conversations`: a column with a list of messages.

A message may have the keys role and content, or from and value (ShareGPT), in both formats.
"""

from collections.abc import Callable

from trainer.chats.json_values import InvalidChat
from trainer.sources.config import SourceConfig
from trainer.sources.record_formats.base import (
    CHAT_COLUMNS,
    BoundFormat,
    ChatContent,
    Values,
    chat,
    optional_string,
    turn,
)


class MessagesFormat:
    """Chats: the column `messages`, or the one that `messages_column` names, with a list of messages."""

    name, column = "messages", "messages"

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return (config.messages_column or self.column,)

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        (column,) = columns = self.columns(config)

        def parse(values: Values) -> ChatContent:
            if values.get(column) is None:
                raise InvalidChat(f"{column!r} is missing, expected a list of messages")
            content = chat(values[column], values, config)
            if not (system := optional_string(values, "system")) or not content.messages:
                return content
            if content.messages[0]["role"] == "system":
                raise InvalidChat("a system message and the column 'system'; remove one of them")
            return ChatContent([turn("system", system), *content.messages], content.tools)

        return BoundFormat(self.name, "chats", columns, parse, ("system", *CHAT_COLUMNS))


class ConversationsFormat(MessagesFormat):
    """Chats: the column `conversations` with a list of messages, as in ShareGPT."""

    name, column = "conversations", "conversations"
