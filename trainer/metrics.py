"""Metrics: one JSON object a line, written before anything is shown."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
Listener = Callable[[Event], None]


class Metrics:
    """Appends events to a JSONL file, then hands them to a listener. Use as a context manager."""

    def __init__(self, path: Path, listener: Listener | None = None) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._listener = listener

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def emit(self, event: str, **values: Any) -> None:
        """One line: the event's name, the time (Unix seconds) and its values."""
        record = {"event": event, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._listener is not None:
            self._listener(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a run, in the order they were written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
