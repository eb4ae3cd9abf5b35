"""Settings of the training data."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.chats.config import SupervisionConfig
from trainer.config_section import Name, PathText, Positive, Section


class SourceConfig(Section):
    """[[data.sources]] Texts or chats of one kind: files, or one Hugging Face dataset."""

    name: Name | None = None
    """Domain of the documents where no column names one. Default: the name of the file or dataset."""
    files: list[PathText] = []
    """Text files (one document each), .jsonl (one document per line) or .parquet (one document per row), by path, by
    pattern ("shards/*.jsonl", sorted by name) or by name under $TUTELAGE_CACHE/data."""
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
    text_column: str = "text"
    """Column (key of a .jsonl line) of the text."""
    messages_column: str | None = None
    """Column with a list of messages. Each document is then a chat, and its assistant texts are supervised."""
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
        return self


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
    """Append EOS to the last window of each document, for the student and for every teacher."""
    too_long: Literal["refuse", "shorten"] = "refuse"
    """A sample that exceeds the limit of some model: `refuse` ends the run and names the sample, `shorten` shortens it
    for all models alike."""
    invalid_chats: Literal["refuse", "skip"] = "refuse"
    """A chat whose supervised spans cannot be found in every model's rendering: `refuse` ends the run, `skip` skips and
    counts it."""

    supervision: SupervisionConfig = SupervisionConfig()
    """[data.supervision] The parts of a chat that are trained on."""

    @property
    def has_chats(self) -> bool:
        """Whether some source contains chats."""
        return any(source.messages_column is not None for source in self.sources)

    @property
    def names_teachers(self) -> bool:
        """Whether every source has a column that names the teacher of a document."""
        return all(source.teacher_column is not None for source in self.sources)
