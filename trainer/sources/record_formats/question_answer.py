"""Record format `question_answer`."""

from collections.abc import Callable

from trainer.sources.config import SourceConfig
from trainer.sources.record_formats.base import CHAT_COLUMNS, BoundFormat, ChatContent, Values, chat, string, turn


class QuestionAnswerFormat:
    """Chats: the columns `question` and `answer`, as strings."""

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return ("question", "answer")

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        def parse(values: Values) -> ChatContent:
            messages = [turn("user", string(values, "question")), turn("assistant", string(values, "answer"))]
            return chat(messages, values, config)

        return BoundFormat("question_answer", "chats", self.columns(config), parse, CHAT_COLUMNS)
