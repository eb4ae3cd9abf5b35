"""Record format `instruction`."""

from collections.abc import Callable

from trainer.chats.json_values import InvalidChat, Message
from trainer.sources.config import SourceConfig
from trainer.sources.record_formats.base import (
    CHAT_COLUMNS,
    BoundFormat,
    ChatContent,
    Values,
    chat,
    optional_string,
    string,
    turn,
)


class InstructionFormat:
    """Chats: the columns `instruction`, `output` and perhaps `input`, `system` and `history`, as in Alpaca.

    `input` follows the instruction after a line break; `history` is a list of earlier [question, answer] pairs.
    """

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return ("instruction", "output")

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        def parse(values: Values) -> ChatContent:
            question = [string(values, "instruction"), optional_string(values, "input")]
            messages = [
                *_system(values),
                *_history(values),
                turn("user", "\n".join(part for part in question if part)),
                turn("assistant", string(values, "output")),
            ]
            return chat(messages, values, config)

        optional = ("input", "system", "history", *CHAT_COLUMNS)
        return BoundFormat("instruction", "chats", self.columns(config), parse, optional)


def _system(values: Values) -> list[Message]:
    system = optional_string(values, "system")
    return [turn("system", system)] if system else []


def _history(values: Values) -> list[Message]:
    pairs = values.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise InvalidChat("'history' is not a list of pairs of strings: expected [[question, answer], …]")
    return [message for question, answer in pairs for message in (turn("user", question), turn("assistant", answer))]
