"""A run from beginning to end: next batch, step, log, evaluate, save."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from trainer.config import RunConfig
from trainer.data.order import batch_indices
from trainer.data.samples import Corpus, Sample
from trainer.learning.step import plan_step, train_step
from trainer.ranks import Ranks, joined
from trainer.reports.metrics import Listener, Metrics
from trainer.reports.told import part_of, step_values
from trainer.run import begin
from trainer.stopping import on_sigterm
from trainer.targets.pipeline import Batch, TargetStream


@dataclass(frozen=True)
class RunResult:
    """Held-out bits per byte as (step, bpb), since this start; where the student was exported, if the run ended.

    told_to_end: it was saved and left before its end because the process heard SIGTERM.
    """

    steps: int
    held_out: tuple[tuple[int, float], ...]
    model: Path | None
    told_to_end: bool = False


def train(
    config: RunConfig, *, resume: bool = False, stop_at: int | None = None, listener: Listener | None = None
) -> RunResult:
    """Run to the end, or save and leave after step `stop_at` or on SIGTERM. Every rank calls it alike.

    Raises the errors of trainer, teachers, alignment.
    """
    with joined(config.student.device, config.patience_s) as ranks:
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
                plan = plan_step(config, done, run.num_steps, ranks.size)
                result = train_step(run.student, run.optimizer, batch.lessons, plan, ranks)
                done, fusion_state = done + 1, batch.fusion_state
                step_s = time.monotonic() - began
                parts = ranks.gathered(part_of(batch, plan.teachers, run.student.first_position))
                values = step_values(parts, plan.teachers, result, step_s)
                metrics.emit("step", step=done, ce_weight=plan.objective.ce_weight, **values)
                if done == end or _due(done, config.eval.every_steps):
                    outcome.measure(metrics, done, fusion_state)
                if _due(done, config.output.checkpoint_every_steps):
                    run.save(metrics, done, fusion_state)
                run.settle(metrics)
            run.leave(metrics, done, fusion_state)
            model = outcome.finish(metrics, done) if done == run.num_steps or outcome.stalled else None
            metrics.emit("end", step=done, model=str(model) if model else None, reason=outcome.reason(done))
    told_to_end = done < end and not outcome.stalled
    return RunResult(done, tuple(outcome.held_out), model, told_to_end)


def _batches(config: RunConfig, corpus: Corpus, ranks: Ranks, steps: range) -> Iterator[list[Sample]]:
    """This rank's part of every batch: neighbours in the corpus, so that it has mostly asked about them before."""
    for step in steps:
        indices = sorted(batch_indices(corpus.order, config.train.batch_samples, step))
        yield [corpus.train[i] for i in ranks.part(indices)]


def noted(batches: Iterator[Batch], stream: TargetStream, metrics: Metrics) -> Iterator[Batch]:
    """The batches. What happens to teachers meanwhile goes to the metrics file, even if it ends the run.

    Of several ranks the first one's word is written; `absent` counts what all of them missed.
    """

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
