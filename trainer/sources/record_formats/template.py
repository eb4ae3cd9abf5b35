"""Record format `template`."""

from collections.abc import Callable, Mapping

from trainer.sources.config import SourceConfig, TemplateConfig
from trainer.sources.record_formats.base import (
    CHAT_COLUMNS,
    BoundFormat,
    ChatContent,
    InvalidRecordError,
    Kind,
    TextContent,
    Values,
    chat,
    prompted_text,
    turn,
)


class TemplateFormat:
    """Texts or chats composed of columns by `[data.sources.template]`."""

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return config.template.columns if config.template else ()

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        template = config.template
        assert template is not None
        if "assistant" in template.templates:
            return BoundFormat(
                "template", "chats", template.columns, lambda values: _chat(values, template, config), CHAT_COLUMNS
            )
        kind: Kind = "texts" if template.text is not None else "texts with a masked prompt"
        return BoundFormat("template", kind, template.columns, lambda values: _text(values, template))


def _chat(values: Values, template: TemplateConfig, config: SourceConfig) -> ChatContent:
    rendered = template.render(_strings(values, template.columns))
    return chat([turn(role, rendered[role]) for role in template.templates], values, config)


def _text(values: Values, template: TemplateConfig) -> TextContent:
    rendered = template.render(_strings(values, template.columns))
    if template.text is not None:
        return TextContent(rendered["text"])
    return prompted_text(rendered["prompt"], rendered["completion"])


def _strings(values: Values, columns: tuple[str, ...]) -> Mapping[str, str]:
    """Return strings and numbers as text. Raises InvalidRecordError for other values."""
    for column in columns:
        value = values.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            found = "missing" if value is None else type(value).__name__
            raise InvalidRecordError(f"{column!r} is {found}, expected a string or a number")
    return {column: str(values[column]) for column in columns}
