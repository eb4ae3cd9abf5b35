"""Synthetic metrics files in the format of a real run."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]


class EventFile:
    """Writer that appends events with arbitrary keys to a metrics file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, "time": 1.5e9, **values}) + "\n")


def no_values(_: int) -> Values:
    return {}


def write_run(
    folder: Path,
    num_steps: int,
    *,
    teachers: tuple[str, ...] = (),
    more: Callable[[int], Values] = no_values,
    changes: Mapping[int, tuple[str, str, str]] | None = None,
    run: Values | None = None,
) -> Path:
    """Write the metrics file of a run with 100 tokens per step.

    Every ten steps there is an evaluation, whose held-out bits per byte are 1 / (1 + step / 100).

    more     returns additional values of a step event
    changes  teacher events (kind, teacher, detail) by the step after which they occur
    run      additional sections of the run file in the start event
    """
    folder.mkdir(parents=True, exist_ok=True)
    configs = [{"name": name, "urls": ["http://127.0.0.1:1"], "top_k": 16, "weight": 1.0} for name in teachers]
    with EventFile(folder / "metrics.jsonl") as file:
        file.write("start", step=0, steps=num_steps, samples=40, run={"teachers": configs, **(run or {})})
        file.write("eval", step=0, held_out_bpb=1.0)
        for step in range(1, num_steps + 1):
            file.write("step", step=step, **{**step_values(step, teachers), **more(step)})
            if changes and step in changes:
                kind, teacher, detail = changes[step]
                file.write(kind, teacher=teacher, detail=detail)
            if step % 10 == 0:
                file.write("eval", step=step, held_out_bpb=1 / (1 + step / 100))
        file.write("end", step=num_steps, model=None)
    return folder


def step_values(step: int, teachers: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of one step event."""
    loss = 2 + math.exp(-step / 50)
    values: dict[str, Any] = {"loss": loss, "cross_entropy": loss, "lr": 1e-3, "grad_norm": 1 + step % 3}
    values |= {"tokens": 100, "tokens_per_s": 50.0, "step_s": 1.5, "wait_s": 0.5, "shortened": 0}
    if teachers:
        teacher = {"weight": 1 / len(teachers), "mass": 0.9, "own_bpb": 0.8, "aligned_bpb": 0.79}
        values |= {"divergence": 0.1, "coverage": 1.0, "mass": 0.9, "teachers": dict.fromkeys(teachers, teacher)}
    return values
