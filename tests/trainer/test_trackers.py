"""The registry of trackers: config keys, extras, packages, lazy imports."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest

from trainer.errors import TrackingError
from trainer.telemetry.config import TrackingConfig
from trainer.telemetry.trackers import TRACKERS, tracker_class
from trainer.telemetry.trackers.base import LogEntry, TrackedRun
from trainer.telemetry.tracking import check_trackers

ROOT = Path(__file__).parents[2]


def test_every_tracker_has_a_config_key_and_an_extra_of_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert TRACKERS.keys() == TrackingConfig.model_fields.keys()
    assert TRACKERS.keys() <= project["optional-dependencies"].keys()
    for name in TRACKERS:
        assert tracker_class(name).packages


def test_trackers_are_imported_only_when_configured() -> None:
    code = """
import sys
from trainer.telemetry.config import TrackingConfig
from trainer.telemetry.tracking import check_trackers
check_trackers(TrackingConfig())
print([name for name in sys.modules if name.startswith("trainer.telemetry.trackers.")])
check_trackers(TrackingConfig(tensorboard=True, wandb="x", mlflow="x"))
print([name for name in ("tensorboard", "wandb", "mlflow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['trainer.telemetry.trackers.base']", "[]"]


class NewTracker:
    packages: ClassVar[tuple[str, ...]] = ("json", "a_missing_package")

    def __init__(self, run: TrackedRun) -> None:
        raise AssertionError("a tracker whose packages are missing is not opened")

    def write(self, entry: LogEntry) -> None: ...

    def close(self, failed: bool) -> None: ...


class NewTrackingConfig(TrackingConfig):
    new: bool = True


def test_the_packages_of_a_new_tracker_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "new", f"{__name__}:NewTracker")
    with pytest.raises(TrackingError, match="tracking.new: a_missing_package is not installed: .* extra new"):
        check_trackers(NewTrackingConfig())
    check_trackers(NewTrackingConfig(new=False))
