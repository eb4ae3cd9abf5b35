"""Tables as sources: Parquet and Arrow files, read by `datasets`, and Hugging Face datasets. A row is a document.

`datasets` stores rows in memory-mapped Arrow files, so that any row is read without the others. It converts Parquet
files and datasets of the hub to Arrow once, in its cache. Code that belongs to a dataset is never run.
"""

import atexit
import errno
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.errors import DataError
from trainer.paths import cache_dir
from trainer.sources.arrow_files import map_arrow
from trainer.sources.base import Documents, Table, TableRecord
from trainer.sources.config import SourceConfig
from trainer.sources.data_file import DataFile, open_data_file
from trainer.sources.encoding import describe_utf8_error
from trainer.sources.record_formats.base import InvalidRecordError
from trainer.sources.table_documents import TableDocuments

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("tutelage.data")
NEWLINE = "\n"
NUM_EXAMINED_ROWS = 100
UNREADABLE = (ValueError, OverflowError)
"""Errors raised for values that Python cannot represent: strings that are not UTF-8, times after the year 9999."""


class ParquetSource:
    """Parquet files."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def open(self, path: Path, config: SourceConfig) -> Documents:
        return TableDocuments(ParquetTable(open_data_file(path)), config)


class ArrowSource:
    """Arrow files: the stream format, which `datasets` writes, or the file format."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow",)

    def open(self, path: Path, config: SourceConfig) -> Documents:
        file, datasets = open_data_file(path), _import_datasets()
        try:
            table = map_arrow(file.content.path)
            table.validate(full=True)  # offsets of a damaged file may lie outside of it
            dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
        except Exception as error:  # a damaged file or schema: `datasets` and Arrow raise errors of any kind
            raise DataError(f"cannot read {path}: {_first_line(error)}") from error
        return TableDocuments(DatasetTable(path.name, str(path), dataset, file), config)


class DatasetSource:
    """Hugging Face datasets: a folder written by `save_to_disk`, or a dataset of the hub."""

    suffixes: ClassVar[tuple[str, ...]] = ()

    def open(self, path: Path, config: SourceConfig) -> Documents:
        name = config.dataset or ""
        dataset = _load_dataset(name, config)
        if isinstance(dataset, dict):
            split = config.split or (next(iter(dataset)) if len(dataset) == 1 else None)
            if split not in dataset:
                raise DataError(f"data.sources: {name} has the splits {', '.join(dataset)}: set split to one of them")
            dataset = dataset[split]
        return TableDocuments(DatasetTable(path.name, name, dataset), config)


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


class ParquetTable:
    """A Parquet file whose columns are known. `select` converts some of them to Arrow, in the cache of `datasets`."""

    unit = "row"

    def __init__(self, file: DataFile) -> None:
        from pyarrow import parquet  # takes a moment to load

        self.name, self.where = file.path.name, str(file.path)
        self._file = file
        try:
            self._parquet = parquet.ParquetFile(file.content.path)
            self.columns: Sequence[str] = self._parquet.schema_arrow.names
        except Exception as error:  # a damaged file or schema: Arrow raises errors of any kind
            raise DataError(f"cannot read {self.where}: {_first_line(error)}") from error

    @property
    def identity(self) -> tuple[object, ...]:
        return self._file.original.identity

    def example(self, column: str) -> object:
        try:
            batches = self._parquet.iter_batches(NUM_EXAMINED_ROWS, columns=[column])
            rows = next(batches).column(0)
        except StopIteration:  # no row
            return None
        except Exception as error:
            raise DataError(f"cannot read {self.where}: {_first_line(error)}") from error
        return _first_value(row.as_py for row in rows)

    def select(self, columns: Sequence[str]) -> Table:
        datasets = _import_datasets()
        try:
            dataset = datasets.Dataset.from_parquet(
                str(self._file.content.path), cache_dir=str(_datasets_cache()), columns=list(columns)
            )
        except Exception as error:  # as above, and errors of `datasets`
            raise DataError(f"cannot read {self.where}: {_reason(error)}") from error
        return DatasetTable(self.name, self.where, dataset, self._file)

    def scan(self) -> Iterator[TableRecord]:
        return self.select(self.columns).scan()

    def load(self, offset: int, length: int) -> Mapping[str, Any]:
        return self.select(self.columns).load(offset, length)

    def check(self) -> None:
        self._file.original.check()


class DatasetTable:
    """The rows of a dataset. `file` is the file that they were read from, if there is one."""

    unit = "row"

    def __init__(self, name: str, where: str, dataset: "Dataset", file: DataFile | None = None) -> None:
        self.name, self.where = name, where
        self.columns: Sequence[str] = dataset.column_names
        self._dataset = dataset
        self._file = file

    @property
    def identity(self) -> tuple[object, ...]:
        """Identity of the file; without one, the fingerprint of `datasets` and sizes and times of the Arrow files."""
        if self._file is not None:
            return self._file.original.identity
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return (self._dataset._fingerprint, len(self._dataset), *stamps)

    def example(self, column: str) -> object:
        rows = self._dataset.select_columns([column])
        return _first_value(partial(_value, rows, i, column) for i in range(min(NUM_EXAMINED_ROWS, len(rows))))

    def select(self, columns: Sequence[str]) -> Table:
        return DatasetTable(self.name, self.where, self._dataset.select_columns(list(columns)), self._file)

    def scan(self) -> Iterator[TableRecord]:
        """Yield one record per row. `load` of a row with an unreadable value raises InvalidRecordError."""
        self.check()
        row = 0
        while row < len(self._dataset):
            rows = iter(self._dataset.select(range(row, len(self._dataset))) if row else self._dataset)
            try:
                for values in rows:
                    yield TableRecord(row, 0, row + 1, partial(self._present, values))
                    row += 1
            except UNREADABLE:  # Arrow does not check the values of a file; the iteration cannot continue
                yield TableRecord(row, 0, row + 1, partial(self.load, row, 0))
                row += 1

    def load(self, offset: int, length: int) -> Mapping[str, Any]:
        try:
            return self._present(self._dataset[offset])
        except UnicodeDecodeError as error:
            raise InvalidRecordError(describe_utf8_error(error, 0)) from error
        except UNREADABLE as error:
            raise InvalidRecordError(f"a value that cannot be read: {_first_line(error)}") from error

    def _present(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        present: Mapping[str, Any] = without_absent_keys(values, self._dataset.features)
        return present

    def check(self) -> None:
        if self._file is not None:
            self._file.original.check()


def _first_value(loads: Iterable[Callable[[], object]]) -> object:
    """Return the first value that is not null. Values that cannot be read are counted when the rows are indexed."""
    for load in loads:
        try:
            value = load()
        except UNREADABLE:
            continue
        if value is not None:
            return value
    return None


def _value(rows: "Dataset", row: int, column: str) -> object:
    return rows[row][column]


def without_absent_keys(value: Any, feature: Any) -> Any:
    """Remove the null fields of structs at every depth. Nulls inside of JSON values are kept.

    In Arrow, all structs of a column have the same fields; a field that a struct lacks is null. `datasets` stores
    objects with different keys as JSON.

    feature  description of the value by `datasets`: a dict for a struct
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: without_absent_keys(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(value, list) and (inner := getattr(feature, "feature", None)) is not None:
        return [without_absent_keys(item, inner) for item in value]
    return value


def _datasets_cache() -> Path:
    """Return the folder of the cache for `datasets`; a temporary one if that cannot be written."""
    folder = cache_dir() / "datasets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): tables are converted for this start only; free disk space, or set "
            "TUTELAGE_CACHE to another directory",
            folder,
            error.strerror,
        )
    try:
        scratch = Path(tempfile.mkdtemp(prefix="tutelage-datasets-"))
    except OSError as error:
        raise DataError(
            f"cannot convert tables in the cache or in a temporary directory ({error.strerror}): free disk space, or "
            "set TUTELAGE_CACHE or TMPDIR to another directory"
        ) from error
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Parquet files, Arrow files and Hugging Face datasets need the package extra: tutelage[data]"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _reason(error: BaseException) -> str:
    """Return the first line of an error, and what to do if the disk is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{cause.strerror} in the cache: free disk space, or set TUTELAGE_CACHE to another directory"
        cause = cause.__cause__ or cause.__context__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).partition(NEWLINE)[0] or type(error).__name__
