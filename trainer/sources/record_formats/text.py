"""Record format `text`."""

from collections.abc import Callable

from trainer.sources.config import SourceConfig
from trainer.sources.record_formats.base import BoundFormat, TextContent, string


class TextFormat:
    """Texts: the column `text`, or the one that `text_column` names."""

    def columns(self, config: SourceConfig) -> tuple[str, ...]:
        return (config.text_column or "text",)

    def bind(self, config: SourceConfig, example: Callable[[str], object]) -> BoundFormat:
        (column,) = columns = self.columns(config)
        return BoundFormat("text", "texts", columns, lambda values: TextContent(string(values, column)))
