"""Documents in rows: .parquet files and Hugging Face datasets, through the library `datasets`.

It keeps rows in Arrow files that are mapped into memory, so any row is there without the others. What is no such file
yet (Parquet, a dataset of the hub) it writes once into its cache. Code that comes with a dataset is never run.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as parquet

from trainer.config import SourceConfig
from trainer.data.columns import content_of
from trainer.data.sources import Broken, Found, judged
from trainer.errors import DataError
from trainer.places import cache_dir

if TYPE_CHECKING:
    from datasets import Dataset

NEWLINE = "\n"


def open_parquet(path: Path, columns: SourceConfig) -> "Rows":
    """The rows of a .parquet file. Raises DataError if it cannot be read."""
    library = _library()
    try:
        dataset = library.Dataset.from_parquet(
            str(path),
            cache_dir=str(cache_dir() / "datasets"),
            columns=_named(str(path), parquet.read_schema(path).names, columns),
        )
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from error
    return Rows(path.name, str(path), dataset, columns)


def open_dataset(source: SourceConfig) -> "Rows":
    """A folder that `save_to_disk` wrote, or a dataset of the hub. Raises DataError naming what is missing."""
    library, name = _library(), source.dataset or ""
    folders = [Path(name).expanduser(), cache_dir() / "data" / name]
    folder = next((path for path in folders if path.is_dir()), None)
    try:
        if folder is not None:
            found = library.load_from_disk(str(folder))
        else:
            found = library.load_dataset(name, source.config_name, split=source.split)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        where = f"the folder {folder}" if folder else "no folder of that name, and the hub"
        raise DataError(f"data.sources: cannot load the dataset {name} ({where}): {_first_line(error)}") from error
    if isinstance(found, dict):
        split = source.split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            raise DataError(f"data.sources: {name} has the splits {', '.join(found)}: set split to one of them")
        found = found[split]
    return Rows(Path(name).name, name, found, source)


class Rows:
    """A document a row."""

    def __init__(self, name: str, where: str, dataset: "Dataset", columns: SourceConfig) -> None:
        self.name = name
        self._where = where
        self._columns = columns
        self._dataset = dataset.select_columns(_named(where, dataset.column_names, columns))

    @property
    def identity(self) -> tuple[object, ...]:
        """The library's own fingerprint, and the files that it reads from."""
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return (self._dataset._fingerprint, len(self._dataset), *stamps)

    def scan(self) -> Iterator[Found | Broken]:
        for row, values in enumerate(self._dataset):
            where = f"{self._where}, row {row + 1}"
            yield from judged(where, (row, 0, row + 1), partial(without_nulls, values), self._columns)

    def read(self, place: int, length: int, begin: int, end: int) -> bytes:
        return content_of(without_nulls(self._dataset[place]), self._columns).content[begin:end]


def _named(where: str, there: Sequence[str], columns: SourceConfig) -> list[str]:
    """The columns to read. Raises DataError if one that the run file names is not there."""
    named = [columns.messages_column or columns.text_column, columns.domain_column, columns.teacher_column]
    for column in named:
        if column and column not in there:
            raise DataError(f"{where} has no column {column!r}; it has {', '.join(there)}")
    tools = ["tools"] if columns.messages_column and "tools" in there else []
    return [*dict.fromkeys(column for column in named if column), *tools]


def without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys that any of them has; where one has no such key, it is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("Parquet and Hugging Face datasets need a package: install Tutelage's extra data") from error
    datasets.disable_progress_bars()
    return datasets


def _first_line(error: BaseException) -> str:
    return str(error).partition(NEWLINE)[0] or type(error).__name__
