"""Metrics: one JSON object a line, written before anything is shown."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import MetricsError

Event = Mapping[str, Any]
Listener = Callable[[Event], None]


class Metrics:
    """Appends events to a JSONL file, then hands them to a listener. Use as a context manager.

    Raises MetricsError if the file cannot be written. A line that an earlier run left half-written is cut off first.
    """

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self._path = path
        self._listener = listener
        try:
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise MetricsError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def emit(self, event: str, **values: Any) -> None:
        """One line: the event's name, the time (Unix seconds) and its values."""
        record = {"event": event, "time": round(time.time(), 3), **values}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {error.strerror}; make room, then --resume") from error
        if written != len(line):
            raise MetricsError(f"cannot write {self._path}: the disk is full; make room, then --resume")
        if self._listener is not None:
            self._listener(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a run, in the order they were written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
