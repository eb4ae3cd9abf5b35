"""The tools that a run can be tracked with. Each is imported where it is opened; they may raise whatever they like.

On --resume a run of a tool is continued; which one it is stands in tracking.json in the run's folder.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trainer.config import RunConfig
from trainer.reports.metrics import flat

IDS = "tracking.json"
LONGEST = 5000  # characters that MLflow takes in a value
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """What a tracker is told at once: figures by path at a step, at a time in Unix seconds.

    words  a short title and a sentence, where something happened to a teacher
    """

    step: int
    time: float
    figures: Mapping[str, float]
    words: tuple[str, str] | None = None


class Tracker(Protocol):
    """One tool, opened for one run."""

    def write(self, point: Point) -> None: ...

    def close(self, failed: bool) -> None: ...


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked: its file, its folder, and the steps that were done before this start."""

    config: RunConfig
    folder: Path
    done: int

    @property
    def values(self) -> dict[str, Any]:
        """The run file as JSON values."""
        return self.config.model_dump(mode="json")

    @property
    def ids(self) -> dict[str, str]:
        """Which run of each tool this is, as far as it was tracked before."""
        path = self.folder / IDS
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def keep_id(self, tool: str, value: str) -> None:
        (self.folder / IDS).write_text(json.dumps(self.ids | {tool: value}) + "\n", encoding="utf-8")


class _TensorBoard:
    """Event files. Steps that a killed run had made after its last checkpoint are purged."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.done + 1)
        whole = json.dumps(run.values, indent=2).replace("\n", "\n    ")  # markdown: indented is code
        self._writer.add_text("run", f"    {whole}", run.done)

    def write(self, point: Point) -> None:
        for name, value in point.figures.items():
            self._writer.add_scalar(name, value, point.step, walltime=point.time)
        if point.words:
            self._writer.add_text("events", ": ".join(point.words), point.step, walltime=point.time)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases. Its own counter only grows, so curves run along our step instead."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        known = run.ids.get("wandb")
        self._run = wandb.init(
            project=run.config.tracking.wandb,
            dir=run.folder,
            config=run.values,
            id=known,
            resume="allow" if known else None,
        )
        run.keep_id("wandb", self._run.id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, point: Point) -> None:
        words = {"events": ": ".join(point.words)} if point.words else {}
        self._run.log({**point.figures, **words, "step": point.step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of MLflow, by its client: nothing global is set."""

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        local = run.folder.resolve() / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            local.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{local / 'mlflow.db'}")
        self._run_id = run.ids.get("mlflow", "")
        if self._run_id:
            self._client.update_run(self._run_id, status="RUNNING")
            return
        name = str(run.config.tracking.mlflow)
        experiment = self._client.get_experiment_by_name(name)
        place = None if uri else (local / "artifacts").as_uri()
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name, place)
        self._run_id = self._client.create_run(experiment_id, run_name=run.folder.name).info.run_id
        run.keep_id("mlflow", self._run_id)
        params = [Param(_key(name), str(value)[:LONGEST]) for name, value in flat(run.values) if value is not None]
        for some in _parts(params, 100):  # the most that it takes at once
            self._client.log_batch(self._run_id, params=some)

    def write(self, point: Point) -> None:
        time_ms = round(point.time * 1000)
        metrics = [self._metric(_key(name), value, time_ms, point.step) for name, value in point.figures.items()]
        for some in _parts(metrics, 1000):
            self._client.log_batch(self._run_id, metrics=some)
        if point.words:
            title, text = point.words
            self._client.set_tag(self._run_id, _key(title), f"after step {point.step}: {text}"[:LONGEST])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _key(name: str) -> str:
    """MLflow takes letters, digits and _-. :/ in a key."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _parts(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    return (items[begin : begin + most] for begin in range(0, len(items), most))


PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
