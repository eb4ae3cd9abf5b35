"""A run from beginning to end: next batch, step, log, evaluate, save."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import RunConfig
from trainer.data import Corpus, Sample
from trainer.metrics import Listener, Metrics
from trainer.order import batch_indices
from trainer.pipeline import Batch, TargetStream, labels_of
from trainer.ranks import Ranks, joined
from trainer.run import begin
from trainer.step import StepResult, plan_step, train_step
from trainer.stopping import on_sigterm
from trainer.student import Student


@dataclass(frozen=True)
class RunResult:
    """Held-out bits per byte as (step, bpb), since this start; where the student was exported, if the run ended."""

    steps: int
    held_out: tuple[tuple[int, float], ...]
    model: Path | None


def train(
    config: RunConfig, *, resume: bool = False, stop_at: int | None = None, listener: Listener | None = None
) -> RunResult:
    """Run to the end, or save and leave after step `stop_at` or on SIGTERM. Every rank calls it alike.

    Raises the errors of trainer, teachers, alignment.
    """
    with joined(config.student.device) as ranks:
        return _train(config, ranks, resume, stop_at, listener)


def _train(config: RunConfig, ranks: Ranks, resume: bool, stop_at: int | None, listener: Listener | None) -> RunResult:
    run = begin(config, ranks, resume)
    outcome, done, fusion_state = run.outcome, run.done, run.fuser.state
    end = min(run.num_steps, stop_at or run.num_steps)
    samples = _batches(config, run.corpus, ranks, range(done, end))
    with TargetStream(config, run.reader, samples, fuser=run.fuser, first_step=done) as stream:
        batches = iter(stream)
        first = list(islice(batches, 1))  # nothing is written before every teacher has been checked
        outcome.hear_teachers()
        with on_sigterm(stream.stop), run.opened(listener, stream.connect_s) as metrics:
            outcome.measure(metrics, done, fusion_state)
            ready = noted(chain(first, batches), stream, metrics)
            while not outcome.stalled and not ranks.any((batch := next(ready, None)) is None):
                assert batch is not None
                began = time.monotonic()
                plan = plan_step(config, done, run.num_steps)
                result = train_step(run.student, run.optimizer, batch.lessons, plan, ranks)
                done, fusion_state = done + 1, batch.fusion_state
                step_s = time.monotonic() - began
                values = step_values(config, run.student, batch, result, step_s)
                metrics.emit("step", step=done, ce_weight=plan.objective.ce_weight, **values)
                if done == end or _due(done, config.eval.every_steps):
                    outcome.measure(metrics, done, fusion_state)
                if _due(done, config.output.checkpoint_every_steps):
                    run.save(done, fusion_state)
                run.settle(metrics)
            run.leave(metrics, done, fusion_state)
            model = outcome.finish(metrics, done) if done == run.num_steps or outcome.stalled else None
            metrics.emit("end", step=done, model=str(model) if model else None, reason=outcome.reason(done))
    return RunResult(done, tuple(outcome.held_out), model)


def _batches(config: RunConfig, corpus: Corpus, ranks: Ranks, steps: range) -> Iterator[list[Sample]]:
    """This rank's part of every batch."""
    for step in steps:
        indices = batch_indices(corpus.order, config.train.batch_samples, step)
        yield [corpus.train[i] for i in ranks.part(indices)]


def noted(batches: Iterator[Batch], stream: TargetStream, metrics: Metrics) -> Iterator[Batch]:
    """The batches. What happens to teachers meanwhile goes to the metrics file, even if it ends the run."""

    def note() -> None:
        for event in stream.events():
            metrics.emit(event["kind"], teacher=event["teacher"], detail=event["detail"])

    try:
        for batch in batches:
            note()
            yield batch
    except Exception:
        note()
        raise


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def step_values(config: RunConfig, student: Student, batch: Batch, result: StepResult, step_s: float) -> dict[str, Any]:
    """What the metrics file says of one step."""
    values: dict[str, Any] = {
        "loss": result.loss,
        "cross_entropy": result.cross_entropy,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": result.num_tokens,
        "tokens_per_s": result.num_tokens / (step_s + batch.waited_s),
        "step_s": step_s,
        **batch.times,
        "shortened": sum(lesson.shortened for lesson in batch.lessons),
        "skipped": batch.num_skipped,
        "folded_system": sum(bool(r and r.folded_system) for r in (le.reading.rendered for le in batch.lessons)),
    }
    if not config.teachers:
        return values
    columns = [labels_of(lesson, student.first_position) for lesson in batch.lessons]
    targets = [target for _, target in columns if target is not None]
    valid = sum(int(t.valid.sum()) for t in targets)
    teachers = {}
    for i, teacher in enumerate(config.teachers):
        total = sum((lesson.reports[i] for lesson in batch.lessons[1:]), batch.lessons[0].reports[i])
        share = float(np.mean([lesson.shares[i] for lesson in batch.lessons]))
        fleet = dict(batch.fleets.get(teacher.name, {}))
        teachers[teacher.name] = {
            "share": share,
            "left_out": sum(lesson.left_out[i] for lesson in batch.lessons),
            "absent": sum(lesson.absent[i] for lesson in batch.lessons),
            "mass": _number(total.mean_mass),
            "own_bpb": _number(total.teacher_bpb),
            "aligned_bpb": _number(total.aligned_bpb),
            "waited_s": batch.waited_on.get(teacher.name, 0.0),
            "tokens_per_s": fleet.pop("tokens_per_s", 0.0),
            "fleet": fleet,
        }
        if teacher.name in result.parts:
            teachers[teacher.name]["loss"] = result.parts[teacher.name]
    return values | {
        "divergence": result.divergence,
        "coverage": valid / sum(len(t) for t in targets) if targets else None,
        "mass": sum(float(t.mass.sum()) for t in targets) / max(valid, 1) if targets else None,
        "tail": sum(float(t.tail.sum()) for t in targets) / max(valid, 1) if targets else None,
        "vanished": sum(lesson.vanished for lesson in batch.lessons),
        "teachers": teachers,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN; a figure over no bytes is absent."""
    return value if math.isfinite(value) else None
