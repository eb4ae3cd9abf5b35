"""Interface of the trackers: the entries that they receive, and the tool's run that they continue after --resume."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from trainer.config import RunConfig
from trainer.manifest import read_regular, replace_file
from trainer.telemetry.json_text import to_json

RUN_IDS_FILE = "tracking.json"


@dataclass(frozen=True)
class LogEntry:
    """Everything that a tracker records at once.

    step     steps completed
    time     Unix seconds
    values   finite numbers by path, for example "teachers/gemma/weight"
    message  title and text of something that happened to a teacher, else None
    """

    step: int
    time: float
    values: Mapping[str, float]
    message: tuple[str, str] | None = None


@dataclass(frozen=True)
class TrackedRun:
    """The run that is tracked: its run file, its folder, and the steps completed before this start."""

    config: RunConfig
    folder: Path
    done: int

    @property
    def config_values(self) -> dict[str, Any]:
        """The run file as JSON values."""
        return self.config.model_dump(mode="json")

    @property
    def run_ids(self) -> dict[str, str]:
        """Id of this run in each tool that has tracked it before, from tracking.json in the run's folder."""
        path = self.folder / RUN_IDS_FILE
        return dict(json.loads(read_regular(path))) if path.exists() else {}

    def save_run_id(self, name: str, run_id: str) -> None:
        """Store the id of this run in the tool `name`, so that --resume continues it."""
        replace_file(self.folder / RUN_IDS_FILE, to_json(self.run_ids | {name: run_id}) + "\n")


class Tracker(Protocol):
    """One tool, opened for one run. Methods run on one thread and may raise any exception."""

    packages: ClassVar[tuple[str, ...]]
    """Names of the packages that the tool needs. The extra of the tracker's name installs them."""

    def __init__(self, run: TrackedRun) -> None: ...

    def write(self, entry: LogEntry) -> None:
        """Record the values and the message of one event."""
        ...

    def close(self, failed: bool) -> None:
        """Flush all entries and mark the run as finished or failed."""
        ...
