"""Settings of experiment trackers."""

import difflib
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from trainer.config_section import Section
from trainer.telemetry.trackers import TRACKERS


class TrackingConfig(Section):
    """[tracking] Trackers that receive the events of metrics.jsonl, which is always written and holds everything.

    Every tracker of the registry has a key of its name; those without a field here take true or a string.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, bool | str] = Field(init=False)

    tensorboard: bool = False
    """Write event files to the folder `tensorboard` in the folder of the run. Requires the extra `tensorboard`."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project at Weights & Biases; entity, key and mode come from its environment variables. Requires the extra
    `wandb`."""
    mlflow: Annotated[str, Field(min_length=1)] | None = None
    """Experiment in MLflow, at MLFLOW_TRACKING_URI, otherwise in the folder `mlflow` of the run. Requires the extra
    `mlflow`."""

    @model_validator(mode="after")
    def _check(self) -> "TrackingConfig":
        for name in self.model_extra or {}:
            if name not in TRACKERS:
                nearest = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown tracker {name!r}; the nearest known one is {nearest!r}")
        return self

    @property
    def enabled(self) -> list[str]:
        """Names of the trackers to use, in the order of the registry."""
        return [name for name in TRACKERS if getattr(self, name, None)]
