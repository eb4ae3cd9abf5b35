"""TensorBoard: event files in the folder `tensorboard` of the run."""

from typing import ClassVar

from trainer.telemetry.json_text import to_json
from trainer.telemetry.trackers.base import LogEntry, TrackedRun


class TensorBoardTracker:
    """Scalars by step, and texts for the run file and for lost teachers.

    Steps that a killed run made after its last checkpoint are purged when the run is resumed.
    """

    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.done + 1)
        code = to_json(run.config_values, indent=2).replace("\n", "\n    ")  # Markdown shows indented lines as code
        self._writer.add_text("run", f"    {code}", run.done)

    def write(self, entry: LogEntry) -> None:
        for name, value in entry.values.items():
            self._writer.add_scalar(name, value, entry.step, walltime=entry.time)
        if entry.message:
            self._writer.add_text("events", ": ".join(entry.message), entry.step, walltime=entry.time)

    def close(self, failed: bool) -> None:
        self._writer.close()
