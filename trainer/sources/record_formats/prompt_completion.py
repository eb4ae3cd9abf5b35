"""Record format `prompt_completion`."""

from collections.abc import Callable

from trainer.chats.json_values import InvalidChat, parsed_json, wrong_type
from trainer.sources.config import SourceConfig
from trainer.sources.record_formats.base import (
    CHAT_COLUMNS,
    BoundFormat,
    ChatContent,
    TextContent,
    Values,
    chat,
    prompted_text,
    string,
)

COLUMNS = ("prompt", "completion")


class PromptCompletionFormat:
    """Texts with a masked prompt, or chats: the columns `prompt` and `completion`, as strings or lists of messages.

    Strings are joined as they are, without a chat template. If they are lists of messages, or JSON text of such lists,
    the assistant messages of the completion are supervised, and its messages of tools if data.supervision.tool_results
    is set.
    """

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return COLUMNS

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        if any(_is_messages(example(column)) for column in COLUMNS):
            return BoundFormat(
                "prompt_completion", "chats", COLUMNS, lambda values: _chat(values, config), CHAT_COLUMNS
            )
        return BoundFormat("prompt_completion", "texts with a masked prompt", COLUMNS, _text)


def _text(values: Values) -> TextContent:
    return prompted_text(string(values, "prompt"), string(values, "completion"))


def _is_messages(value: object) -> bool:
    """Return whether a value is a list, or JSON text of a list of messages. Other JSON is text to train on."""
    if not isinstance(value, str):
        return isinstance(value, list)
    if not value.lstrip().startswith("["):
        return False
    try:
        items = parsed_json(value, "")
    except InvalidChat:
        return False
    return bool(items) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)


def _chat(values: Values, config: SourceConfig) -> ChatContent:
    prompt, completion = (_messages(values, column) for column in COLUMNS)
    both = chat([*prompt, *completion], values, config, len(prompt))
    if not any(message["role"] == "assistant" for message in both.messages[len(prompt) :]):
        raise InvalidChat("the completion has no assistant message")
    return both


def _messages(values: Values, column: str) -> list[object]:
    messages = parsed_json(values.get(column), repr(column))
    if not isinstance(messages, list):
        raise wrong_type(messages, repr(column), "a list of messages")
    return messages
