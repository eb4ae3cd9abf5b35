"""Metrics: one JSON object a line, written before anything is shown."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from trainer.errors import MetricsError

Event = Mapping[str, Any]
Listener = Callable[[Event], None]


class Metrics:
    """Appends events to a JSONL file, then hands them to each listener. Use as a context manager.

    Without a path nothing is written or handed on: of several ranks only the first speaks. Raises MetricsError if the
    file cannot be written. A line that an earlier run left half-written is cut off first.
    """

    def __init__(self, path: Path | None, *listeners: Listener | None) -> None:
        self._path = path
        self._listeners = [listener for listener in listeners if listener is not None]
        self._file: RawIOBase | None = None
        if path is None:
            return
        try:
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise MetricsError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def emit(self, event: str, **values: Any) -> None:
        """One line: the event's name, the time (Unix seconds) and its values."""
        if self._file is None:
            return
        record = {"event": event, "time": round(time.time(), 3), **values}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {error.strerror}; make room, then --resume") from error
        if written != len(line):
            raise MetricsError(f"cannot write {self._path}: the disk is full; make room, then --resume")
        for listener in self._listeners:
            listener(record)


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run, one by one, in the order they were written; a last line without its end is left out.

    Raises MetricsError if the file cannot be read, or a line of it is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # being written, or cut off
                try:
                    event = json.loads(line)
                except ValueError as error:
                    raise MetricsError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(event, dict) or "event" not in event:
                    raise MetricsError(f"{path}, line {number}: expected an object with an event, received {event!r}")
                yield event
    except OSError as error:
        raise MetricsError(f"cannot read {path}: {error.strerror}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a run, in the order they were written. Raises as `iter_metrics` does."""
    return list(iter_metrics(path))


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested objects with its path, like teachers/gemma/share; objects in a list by their number."""
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}/")
        else:
            yield path + name, value


def numbers(event: Event) -> dict[str, float]:
    """The figures of an event by path; NaN where the event says that there is none."""
    values = {name: value for name, value in event.items() if name not in ("event", "time", "step")}
    figures = {path: math.nan if value is None else value for path, value in flat(values)}
    return {path: float(v) for path, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
