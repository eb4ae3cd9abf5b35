"""Metrics of runs that were never made, written as a real run writes them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.reports.metrics import Metrics

Values = Mapping[str, Any]


def nothing(_: int) -> Values:
    return {}


def write_run(
    folder: Path,
    num_steps: int,
    *,
    teachers: tuple[str, ...] = (),
    more: Callable[[int], Values] = nothing,
    happens: Mapping[int, tuple[str, str, str]] | None = None,
    run: Values | None = None,
) -> Path:
    """A run of 100 tokens a step whose held-out bits per byte, every ten steps, fall as 1 / (1 + step / 100).

    more     further values of the event of a step
    happens  after which step an event comes, with a teacher and a detail
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = [{"name": name, "urls": ["http://127.0.0.1:1"], "top_k": 16, "weight": 1.0} for name in teachers]
    with Metrics(folder / "metrics.jsonl") as metrics:
        metrics.emit("start", step=0, steps=num_steps, samples=40, run={"teachers": named, **(run or {})})
        metrics.emit("eval", step=0, held_out_bpb=1.0)
        for step in range(1, num_steps + 1):
            metrics.emit("step", step=step, **{**step_values(step, teachers), **more(step)})
            if happens and step in happens:
                kind, teacher, detail = happens[step]
                metrics.emit(kind, teacher=teacher, detail=detail)
            if step % 10 == 0:
                metrics.emit("eval", step=step, held_out_bpb=1 / (1 + step / 100))
        metrics.emit("end", step=num_steps, model=None)
    return folder


def step_values(step: int, teachers: tuple[str, ...]) -> dict[str, Any]:
    """What a step of these runs says."""
    loss = 2 + math.exp(-step / 50)
    values: dict[str, Any] = {"loss": loss, "cross_entropy": loss, "lr": 1e-3, "grad_norm": 1 + step % 3}
    values |= {"tokens": 100, "tokens_per_s": 50.0, "step_s": 1.5, "waited_s": 0.5, "shortened": 0}
    if teachers:
        said = {"share": 1 / len(teachers), "mass": 0.9, "own_bpb": 0.8, "aligned_bpb": 0.79}
        values |= {"forward_kl": 0.1, "coverage": 1.0, "mass": 0.9, "teachers": dict.fromkeys(teachers, said)}
    return values
