"""Weights & Biases: one run in the project that tracking.wandb names."""

from typing import ClassVar

from trainer.telemetry.trackers.base import LogEntry, TrackedRun


class WandbTracker:
    """A run of Weights & Biases, continued under the same id after --resume.

    The step counter of wandb only increases, but a resumed run repeats steps: curves use our own step as x axis.
    """

    packages: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        run_id = run.run_ids.get("wandb")
        self._run = wandb.init(
            project=run.config.tracking.wandb,
            dir=run.folder,
            config=run.config_values,
            id=run_id,
            resume="allow" if run_id else None,
        )
        run.save_run_id("wandb", self._run.id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, entry: LogEntry) -> None:
        message = {"events": ": ".join(entry.message)} if entry.message else {}
        self._run.log({**entry.values, **message, "step": entry.step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
