"""Experiment trackers, by the name of their key in [tracking]. They receive what metrics.jsonl holds.

A new tracker is one file with a class that implements `Tracker` (base.py), one line in TRACKERS, and an extra of the
same name in pyproject.toml if it needs packages. The registry imports no component.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.telemetry.trackers.base import Tracker

TRACKERS: dict[str, str] = {
    "tensorboard": "trainer.telemetry.trackers.tensorboard:TensorBoardTracker",
    "wandb": "trainer.telemetry.trackers.wandb:WandbTracker",
    "mlflow": "trainer.telemetry.trackers.mlflow:MLflowTracker",
}


def tracker_class(name: str) -> "type[Tracker]":
    """Import the class of a tracker. The class imports its packages only when it is instantiated."""
    resolved: type[Tracker] = resolve_name(TRACKERS[name])
    return resolved
