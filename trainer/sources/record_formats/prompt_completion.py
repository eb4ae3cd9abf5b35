"""Record format `prompt_completion`."""

from collections.abc import Callable

from trainer.chats.json_values import InvalidChat
from trainer.chats.messages import SUPERVISED_ROLES
from trainer.sources.config import SourceConfig
from trainer.sources.record_formats.base import (
    CHAT_COLUMNS,
    BoundFormat,
    ChatContent,
    InvalidRecordError,
    TextContent,
    Values,
    chat,
    prompted_text,
    string,
)

COLUMNS = ("prompt", "completion")


class PromptCompletionFormat:
    """Texts with a masked prompt, or chats: the columns `prompt` and `completion`, as strings or lists of messages.

    Strings are joined as they are, without a chat template. Of lists of messages, only those of
    the completion are supervised.
    """

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return COLUMNS

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        if isinstance(example("prompt"), list) or isinstance(example("completion"), list):
            return BoundFormat(
                "prompt_completion", "chats", COLUMNS, lambda values: _chat(values, config), CHAT_COLUMNS
            )
        return BoundFormat("prompt_completion", "texts with a masked prompt", COLUMNS, _text)


def _text(values: Values) -> TextContent:
    return prompted_text(string(values, "prompt"), string(values, "completion"))


def _chat(values: Values, config: SourceConfig) -> ChatContent:
    for column in COLUMNS:
        if not isinstance(values.get(column), list):
            raise InvalidRecordError(f"{column!r} is {type(values.get(column)).__name__}, expected a list of messages")
    both = chat([*values["prompt"], *values["completion"]], values, config)
    num_prompt = len(values["prompt"])
    if not any(message["role"] == "assistant" for message in both.messages[num_prompt:]):
        raise InvalidChat("the completion has no assistant message")
    masked = [
        message | {"train": False} if message["role"] in SUPERVISED_ROLES else message for message in both.messages
    ]
    return ChatContent([*masked[:num_prompt], *both.messages[num_prompt:]], both.tools)
