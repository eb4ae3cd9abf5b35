"""Tables as sources: .parquet files and Hugging Face datasets, read by the library `datasets`. A row is a document.

`datasets` stores rows in memory-mapped Arrow files, so that any row is read without the others. It converts Parquet
files and datasets of the hub to Arrow once, in its cache. Code that belongs to a dataset is never run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError
from trainer.paths import cache_dir
from trainer.sources.base import DocumentRef, Documents, InvalidRecord
from trainer.sources.columns import InvalidRecordError, describe_utf8_error, extract_content, parse_document
from trainer.sources.config import SourceConfig
from trainer.sources.content_cache import contents

if TYPE_CHECKING:
    from datasets import Dataset

NEWLINE = "\n"


class ParquetSource:
    """.parquet files."""

    def matches(self, path: Path, config: SourceConfig) -> bool:
        return path.suffix == ".parquet"

    def open(self, path: Path, config: SourceConfig) -> Documents:
        from pyarrow import parquet  # imported here because the registry imports this module for every file

        datasets = _import_datasets()
        try:
            dataset = datasets.Dataset.from_parquet(
                str(path),
                cache_dir=str(cache_dir() / "datasets"),
                columns=_select_columns(str(path), parquet.read_schema(path).names, config),
            )
        except DataError:
            raise
        except Exception as error:  # a damaged file or schema: `datasets` and Arrow raise errors of any kind
            raise DataError(f"cannot read {path}: {_first_line(error)}") from error
        return TableRows(path.name, str(path), dataset, config)


class DatasetSource:
    """Hugging Face datasets: a folder written by `save_to_disk`, or a dataset of the hub."""

    def matches(self, path: Path, config: SourceConfig) -> bool:
        return config.dataset is not None

    def open(self, path: Path, config: SourceConfig) -> Documents:
        name = config.dataset or ""
        dataset = _load_dataset(name, config)
        if isinstance(dataset, dict):
            split = config.split or (next(iter(dataset)) if len(dataset) == 1 else None)
            if split not in dataset:
                raise DataError(f"data.sources: {name} has the splits {', '.join(dataset)}: set split to one of them")
            dataset = dataset[split]
        return TableRows(path.name, name, dataset, config)


def _load_dataset(name: str, config: SourceConfig) -> Any:
    """Load a dataset, or a dict of its splits, from a folder or else from the hub."""
    datasets = _import_datasets()
    folders = [Path(name).expanduser(), cache_dir() / "data" / name]
    folder = next((path for path in folders if path.is_dir()), None)
    try:
        if folder is not None:
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(name, config.config_name, split=config.split)
    except Exception as error:  # a damaged folder, the hub: `datasets` and Arrow raise errors of any kind
        origin = f"the folder {folder}" if folder else "no folder of that name, and the hub"
        raise DataError(f"data.sources: cannot load the dataset {name} ({origin}): {_first_line(error)}") from error


class TableRows:
    """The rows of a table, one document per row. `where` names the table in error messages."""

    def __init__(self, name: str, where: str, dataset: "Dataset", config: SourceConfig) -> None:
        self.name = name
        self._where = where
        self._config = config
        self._dataset = dataset.select_columns(_select_columns(where, dataset.column_names, config))

    @property
    def identity(self) -> tuple[object, ...]:
        """The fingerprint of `datasets`, the number of rows, and the sizes and times of the Arrow files."""
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return (self._dataset._fingerprint, len(self._dataset), *stamps)

    def scan(self) -> Iterator[DocumentRef | InvalidRecord]:
        for row, load_values in enumerate(self._rows()):
            where = f"{self._where}, row {row + 1}"
            record = parse_document(where, (row, 0, row + 1), load_values, self._config)
            if record is not None:
                yield record

    def _rows(self) -> Iterator[Callable[[], Mapping[str, Any]]]:
        """Yield one function per row. It returns the columns of the row, or raises InvalidRecordError."""
        row = 0
        while row < len(self._dataset):
            rows = iter(self._dataset.select(range(row, len(self._dataset))) if row else self._dataset)
            try:
                for values in rows:
                    yield partial(drop_nulls, values)
                    row += 1
            except UnicodeDecodeError:  # Arrow does not check the strings of a file; the iteration cannot continue
                yield partial(self._load_row, row)
                row += 1

    def _load_row(self, row: int) -> Mapping[str, Any]:
        try:
            values: Mapping[str, Any] = drop_nulls(self._dataset[row])
        except UnicodeDecodeError as error:
            raise InvalidRecordError(describe_utf8_error(error, 0)) from error
        return values

    def read(self, offset: int, length: int, begin: int, end: int) -> bytes:
        def load() -> bytes:
            return extract_content(self._load_row(offset), self._config).content

        return contents.get((self, offset), load)[begin:end]


def _select_columns(where: str, available: Sequence[str], config: SourceConfig) -> list[str]:
    """Return the columns to read. Raises DataError if a column of the config is missing."""
    named = [config.messages_column or config.text_column, config.domain_column, config.teacher_column]
    for column in named:
        if column and column not in available:
            raise DataError(f"{where} has no column {column!r}; it has {', '.join(available)}")
    tools = ["tools"] if config.messages_column and "tools" in available else []
    return [*dict.fromkeys(column for column in named if column), *tools]


def drop_nulls(value: Any) -> Any:
    """Remove keys whose value is null, at every depth.

    Arrow gives all objects of a column the same keys, and null to an object that lacks a key.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("Parquet files and Hugging Face datasets need the package extra: tutelage[data]") from error
    datasets.disable_progress_bars()
    return datasets


def _first_line(error: BaseException) -> str:
    return str(error).partition(NEWLINE)[0] or type(error).__name__
