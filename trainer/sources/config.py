"""Settings of the training data."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.chats.config import SupervisionConfig
from trainer.config_section import Name, PathText, Positive, Section, one_of
from trainer.sources import SOURCES
from trainer.sources.record_formats import RECORD_FORMATS

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
Role = Literal["system", "user", "assistant", "tool"]
CONTENT_KEYS = {
    "file_format", "record_format", "text_column", "messages_column", "template", "message_roles", "other_parts"
}  # fmt: skip
"""Keys of a source that determine the content of its documents."""


class TemplateConfig(Section):
    """[data.sources.template] Texts or chats composed of columns. `{NAME}` stands for the value of the column NAME.

    Set `text`; or `prompt` and `completion`, for texts with a masked prompt; or `user`, `assistant` and perhaps
    `system`, for chats.
    """

    text: str | None = None
    """Template of a text."""
    prompt: str | None = None
    """Template of the prompt, which is not supervised."""
    completion: str | None = None
    """Template of the text that follows the prompt directly."""
    system: str | None = None
    """Template of the system message."""
    user: str | None = None
    """Template of the user message."""
    assistant: str | None = None
    """Template of the assistant message."""

    @model_validator(mode="after")
    def _check(self) -> "TemplateConfig":
        keys = tuple(self.templates)
        if keys not in (("text",), ("prompt", "completion"), ("user", "assistant"), ("system", "user", "assistant")):
            raise ValueError(
                "expected the key text, the keys prompt and completion, or the keys user and assistant (and system), "
                f"received {', '.join(keys) or 'none'}"
            )
        if not self.columns:
            raise ValueError("expected at least one column, written as {NAME}")
        return self

    @property
    def templates(self) -> Mapping[str, str]:
        """Templates by key, without the keys that are not set."""
        return {key: value for key, value in self.model_dump().items() if value is not None}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of all parts, in order."""
        return tuple(dict.fromkeys(name for part in self.templates.values() for name in _PLACEHOLDER.findall(part)))

    def render(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return every part with the values of the columns in place of their names."""
        return {key: _PLACEHOLDER.sub(lambda match: values[match[1]], part) for key, part in self.templates.items()}


class SourceConfig(Section):
    """[[data.sources]] Texts or chats of one kind: files, or one Hugging Face dataset."""

    name: Name | None = None
    """Domain of the documents where no column names one. Default: the name of the file or dataset."""
    files: list[PathText] = []
    """Files by path, by pattern ("shards/*.jsonl", sorted by name) or by name under $TUTELAGE_CACHE/data. The suffix is
    the format, see docs/data.md."""
    file_format: Annotated[str, one_of(SOURCES)] | None = None
    """Format of the files, if their suffix does not name it. `text` reads any file as one text."""
    dataset: PathText | None = None
    """Instead of files: a folder written by `save_to_disk`, by path or by name under $TUTELAGE_CACHE/data, or a dataset
    of the Hugging Face hub."""
    config_name: str | None = None
    """Configuration of a dataset of the hub."""
    split: str | None = None
    """Split of the dataset; required if there are several."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Number of times that the windows of this source are used per epoch: 2 is twice; 0.5 is one half of them in one
    epoch and the other half in the next."""
    record_format: Annotated[str, one_of(RECORD_FORMATS)] | None = None
    """Format of the lines and rows. Default: the format whose columns the source has, see docs/data.md."""
    text_column: str | None = None
    """Column (key of a JSON object) of the text. Default: `text`."""
    messages_column: str | None = None
    """Column with a list of messages. Each document is then a chat. Default: `messages` or `conversations`."""
    template: TemplateConfig | None = None
    """[data.sources.template] Texts or chats composed of columns."""
    message_roles: dict[str, Role] = {}
    """Roles of messages beside those of docs/data.md, for example {narrator = "assistant"}."""
    other_parts: Literal["refuse", "drop"] = "refuse"
    """A part of a message that is not text, for example an image: `refuse` makes the chat an invalid record, `drop`
    uses the text of the message alone."""
    domain_column: str | None = None
    """Column of the domain, for fusion by `adaptive`."""
    teacher_column: str | None = None
    """Column of the teacher's name, for fusion by `router`."""

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if bool(self.files) == bool(self.dataset):
            raise ValueError("expected either files or a dataset")
        if self.files and (self.config_name or self.split):
            raise ValueError("config_name and split belong to a dataset; this source has files")
        if self.file_format and (self.dataset or self.file_format == "dataset"):
            raise ValueError("file_format is the format of files; remove it from a source with a dataset")
        self._check_record_format()
        return self

    def _check_record_format(self) -> None:
        """Reject keys of several record formats, and keys that the chosen record format does not read."""
        implied = {
            "text_column": ("text",),
            "messages_column": ("messages", "conversations"),
            "template": ("template",),
        }
        used = [key for key in implied if getattr(self, key) is not None]
        if len(used) > 1:
            raise ValueError(f"{used[0]} and {used[1]} are keys of different record formats; remove one of them")
        if used and self.record_format and self.record_format not in implied[used[0]]:
            raise ValueError(
                f"record_format {self.record_format!r} does not read {used[0]}; remove one of the two keys"
            )
        if self.record_format == "template" and self.template is None:
            raise ValueError("record_format 'template' needs the section [data.sources.template]")


class DataConfig(Section):
    """[data] The texts, and the windows that they are cut into."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    """[[data.sources]] The sources of texts and chats."""
    max_invalid: Annotated[int, Field(ge=0)] = 0
    """Lines and rows that cannot be read are counted and named; more than this many, over all sources, end the run."""
    window_tokens: Annotated[int, Field(ge=2)] = 512
    """Maximum length of a window in student tokens, without BOS."""
    max_windows_per_document: Positive | None = None
    """Use only the first windows of each document."""
    max_samples: Positive | None = None
    """Train on this many windows only, drawn by the seed."""
    close_documents: bool = False
    """Append EOS to the last window of each document, for the student and for every teacher. Without EOS after them, a
    student that is trained on prompts and completions does not learn to stop."""
    too_long: Literal["refuse", "shorten"] = "refuse"
    """A sample that exceeds the limit of some model: `refuse` ends the run and names the sample, `shorten` shortens it
    for all models alike."""
    invalid_chats: Literal["refuse", "skip"] = "refuse"
    """A chat whose supervised spans cannot be found in every model's rendering, or a prompt that leaves no room for its
    completion: `refuse` ends the run, `skip` skips and counts it."""
    supervision: SupervisionConfig = SupervisionConfig()
    """[data.supervision] The parts of a chat that are trained on."""

    @property
    def names_teachers(self) -> bool:
        """Whether every source has a column that names the teacher of a document."""
        return all(source.teacher_column is not None for source in self.sources)
