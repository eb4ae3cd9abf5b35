"""The format of a file: by its suffix, or by the run file."""

from pathlib import Path
from pkgutil import resolve_name

from trainer.errors import DataError
from trainer.sources import SOURCES
from trainer.sources.base import Documents, Source
from trainer.sources.compression import DECOMPRESSORS, split_suffix
from trainer.sources.config import SourceConfig


def open_documents(path: Path, config: SourceConfig) -> Documents:
    """Open a file or dataset. Raises DataError if it cannot be opened, or if the suffix names no format."""
    name = "dataset" if config.dataset is not None else config.file_format or format_of(path)
    if name is None:
        suffixes = " ".join(suffix for each in SOURCES for suffix in _source(each).suffixes)
        raise DataError(
            f"{path}: its suffix names no format; the suffixes are {suffixes}, perhaps followed by one of "
            f'{" ".join(DECOMPRESSORS)}: rename the file, or set file_format in its source, for example "text"'
        )
    return _source(name).open(path, config)


def format_of(path: Path) -> str | None:
    """Return the name of the format that the suffix of a file stands for; None for an unknown suffix."""
    suffix, _ = split_suffix(path)
    return next((name for name in SOURCES if suffix in _source(name).suffixes), None)


def _source(name: str) -> Source:
    source: Source = resolve_name(SOURCES[name])()
    return source
