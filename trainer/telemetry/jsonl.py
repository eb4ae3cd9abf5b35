"""The metrics file of a run, metrics.jsonl: one JSON object per line, written before any listener receives the event.

trainer/telemetry/events.py defines the events.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from trainer.errors import MetricsError
from trainer.telemetry.event_check import MAX_LINE_BYTES, parse_event
from trainer.telemetry.events import Event
from trainer.telemetry.json_text import json_value

METRICS_FILE = "metrics.jsonl"
FIRST_WORDS = b'{"event": "start"'
EventRecord = Mapping[str, Any]
"""A line of the metrics file: the keys `event` and `time` (Unix seconds), then the fields of the event."""
Listener = Callable[[EventRecord], None]


class Metrics:
    """Writer of a metrics file. Appends each event and then passes its record to the listeners.

    Use it as a context manager. Without a path nothing is written and no listener is called: only rank 0 writes. An
    incomplete last line of an earlier run is removed. Raises MetricsError if the file cannot be written. before_write
    is called before each line is written, and may raise.
    """

    def __init__(
        self, path: Path | None, *listeners: Listener | None, before_write: Callable[[], None] = lambda: None
    ) -> None:
        self._path = path
        self._before_write = before_write
        self._listeners = [listener for listener in listeners if listener is not None]
        self._file: RawIOBase | None = None
        if path is None:
            return
        before_write()
        try:
            self._file = open(path, "ab+", buffering=0, opener=_open_without_link)  # noqa: SIM115  see __exit__
            _cut_incomplete_line(self._file, path)
        except OSError as error:
            raise MetricsError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, event: Event) -> None:
        """Append one line: the kind of the event, the time in Unix seconds and the fields that are set."""
        if self._file is None:
            return
        record = json_value({"event": event.kind, "time": round(time.time(), 3), **event.fields()})
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._before_write()
        try:
            num_written = self._file.write(line)
        except OSError as error:
            raise MetricsError(
                f"cannot write {self._path}: {error.strerror}; correct the cause, then continue with --resume"
            ) from error
        if num_written != len(line):
            raise MetricsError(
                f"cannot write {self._path}: the disk is full; free disk space, then continue with --resume"
            )
        for listener in self._listeners:
            listener(record)


def _cut_incomplete_line(file: RawIOBase, path: Path) -> None:
    """Remove an incomplete last line. Raises MetricsError, and closes the file, if it is not a metrics file."""
    file.seek(0)
    written = file.read() or b""
    try:
        next(iter_metrics(path), None)
        if b"\n" not in written and not FIRST_WORDS.startswith(written[: len(FIRST_WORDS)]):
            raise MetricsError(f"{path} holds no events: it is not from a run; remove it or set another output.dir")
    except MetricsError:
        file.close()
        raise
    file.truncate(written.rfind(b"\n") + 1)


def _open_without_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file in the order in which they were written.

    An incomplete last line is skipped. Raises MetricsError if the file cannot be read or a line is not an event
    (trainer/telemetry/event_check.py).
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    return  # the line is being written, or its process was killed
                try:
                    record = parse_event(line)
                except ValueError as error:
                    raise MetricsError(f"{path}, line {number}{error}") from error
                yield record
    except OSError as error:
        raise MetricsError(f"cannot read {path}: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics file. Raises MetricsError as `iter_metrics` does."""
    return list(iter_metrics(path))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for every value of nested mappings, for example ("teachers/gemma/weight", 0.5).

    Mappings in a list have their index as the key.
    """
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def numbers(record: EventRecord) -> dict[str, float]:
    """Return the numbers of a record by path, without `time` and `step`. Null becomes NaN."""
    values = {name: value for name, value in record.items() if name not in ("event", "time", "step")}
    with_nan = {path: math.nan if value is None else value for path, value in flatten(values)}
    return {path: float(v) for path, v in with_nan.items() if isinstance(v, int | float) and not isinstance(v, bool)}
