"""MLflow: one run in the experiment that tracking.mlflow names, at MLFLOW_TRACKING_URI or in the run's folder."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

from trainer.telemetry.jsonl import flatten
from trainer.telemetry.trackers.base import LogEntry, TrackedRun

MAX_VALUE_CHARS = 5000  # limit of MLflow for parameters and tags
MAX_PARAMS = 100  # limit of MLflow for one batch
MAX_METRICS = 1000  # limit of MLflow for one batch
T = TypeVar("T")


class MLflowTracker:
    """A run of MLflow, continued after --resume. Uses MLflow's client, so that no global state is set."""

    packages: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        local = run.folder.resolve() / "mlflow"
        if uri is None:
            local.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{local / 'mlflow.db'}")
        self._run_id = run.run_ids.get("mlflow", "")
        if self._run_id:
            self._client.update_run(self._run_id, status="RUNNING")
            return
        experiment_id = self._experiment_id(str(run.config.tracking.mlflow), None if uri else local.as_uri())
        self._run_id = self._client.create_run(experiment_id, run_name=run.folder.name).info.run_id
        run.save_run_id("mlflow", self._run_id)
        values = [(_key(name), str(value)) for name, value in flatten(run.config_values) if value is not None]
        params = [Param(key, value[:MAX_VALUE_CHARS]) for key, value in values]
        for batch in _batches(params, MAX_PARAMS):
            self._client.log_batch(self._run_id, params=batch)

    def _experiment_id(self, name: str, local_uri: str | None) -> Any:
        """Find or create the experiment. A local one keeps its artifacts in the run's folder."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        return self._client.create_experiment(name, f"{local_uri}/artifacts" if local_uri else None)

    def write(self, entry: LogEntry) -> None:
        time_ms = round(entry.time * 1000)
        metrics = [self._metric(_key(name), value, time_ms, entry.step) for name, value in entry.values.items()]
        for batch in _batches(metrics, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)
        if entry.message:
            title, text = entry.message
            self._client.set_tag(self._run_id, _key(title), f"after step {entry.step}: {text}"[:MAX_VALUE_CHARS])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _key(name: str) -> str:
    """Replace the characters that MLflow does not accept in a key: all but letters, digits and _-. :/ ."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))
