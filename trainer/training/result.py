"""The result of a run. Importing this module loads no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """Result of a run, or of one start of it.

    steps       number of steps that the run has done
    held_out    held-out bits per byte as (step, bpb)
    model       folder of the exported student; None if the run has not ended
    terminated  the run was saved before its end because the process received SIGTERM or SIGHUP
    """

    steps: int
    held_out: tuple[tuple[int, float], ...]
    model: Path | None
    terminated: bool = False
