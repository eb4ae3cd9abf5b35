"""The training loop: next batch, step, log, evaluate, save."""

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

from trainer.config import RunConfig
from trainer.distributed import process_group
from trainer.query.stream import ExampleStream
from trainer.records import Batch
from trainer.telemetry.collector import Collector
from trainer.telemetry.events import TEACHER_EVENTS, EndEvent
from trainer.telemetry.jsonl import Listener, Metrics
from trainer.training.optimizer import num_updates
from trainer.training.plan import plan_step
from trainer.training.result import RunResult
from trainer.training.run import Run, begin
from trainer.training.run_lock import run_lock
from trainer.training.skipped_chats import SkippedChats
from trainer.training.step import train_step
from trainer.training.step_metrics import step_event
from trainer.training.stop_signals import StopSource, on_stop_signal

StreamItem = tuple[Batch, Collector]


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    listener: Listener | None = None,
    on_stop: StopSource = on_stop_signal,
) -> RunResult:
    """Train to the end, or save and return after step `stop_at` or on a request of `on_stop`, by default SIGTERM.

    All processes must call this with the same config. Raises UserError, TeacherError, TokenizerError or AlignmentError.
    """
    folder = Path(config.output.dir).expanduser()
    with process_group(config.student.device, config.unavailable_timeout_s) as ranks, run_lock(folder, ranks) as lock:
        return _train(begin(config, ranks, resume, lock), stop_at, listener, on_stop)


def _train(run: Run, stop_at: int | None, listener: Listener | None, on_stop: StopSource) -> RunResult:
    config, ranks = run.config, run.ranks
    evaluator, done, fusion_state = run.evaluator, run.done, run.fuser.state
    end = min(run.num_steps, stop_at or run.num_steps)
    batches = run.batches(range(done, end))
    skipped_chats = SkippedChats(config, run.corpus.order, done)
    with (
        ExampleStream(config, run.tokenizer, batches, fuser=run.fuser, first_step=done) as stream,
        closing(batches),  # before the stream, whose thread may wait for a batch
    ):
        items = iter(stream)
        with on_stop(stream.stop):  # the first batch may wait for a teacher
            is_ready = batches.advance(done, stream.has_ended)
            first = list(islice(items, 1))  # nothing is written before every teacher has been checked
        if stream.is_stopped() or not is_ready:
            for _ in items:  # raises the error, if one has ended the sampling
                pass
            return RunResult(done, (), None, terminated=True)
        run.check_teachers(evaluator.snapshot_teachers(stream))
        remarks = run.check_chats(stream.tokenizers)
        with on_stop(stream.stop), run.opened(listener, stream.connect_s, remarks) as metrics:
            run.evaluate(metrics, done, fusion_state, stream.score)
            logged = _log_teacher_events(chain(first, items), stream, metrics)
            while not evaluator.early_stopped and not ranks.any((item := next(logged, None)) is None):
                assert item is not None
                batch, telemetry = item
                telemetry.sample_s = batches.sample_s
                began = time.monotonic()
                plan = plan_step(config, done, run.num_steps, ranks.size)
                with ranks.reported_wait(f"step {done + 1}, which another process of this run may delay"):
                    result = train_step(run.student, run.optimizer, batch.examples, plan, ranks)
                done, fusion_state, step_s = done + 1, batch.fusion_state, time.monotonic() - began
                collectors = ranks.all_gather(telemetry)
                metrics.write(step_event(done, collectors, plan, result, step_s))
                skipped_chats.check_step(done, result.num_tokens, collectors)
                if done == end or _is_due(done, config.eval.every_steps):
                    run.evaluate(metrics, done, fusion_state, stream.score)
                if _is_due(done, config.output.checkpoint_every_steps):
                    run.save(metrics, done, fusion_state, batches.state(done))
                run.finish_save(metrics)
                batches.advance(done, stream.has_ended)
            run.save_last(metrics, done, fusion_state, batches.state(done))
            ended = done == run.num_steps or evaluator.early_stopped
            if ended:
                skipped_chats.check_end(num_updates(run.optimizer))
            model = evaluator.finish(metrics, done) if ended else None
            metrics.write(EndEvent(step=done, model=str(model) if model else None, reason=evaluator.reason(done)))
    terminated = done < end and not evaluator.early_stopped
    return RunResult(done, tuple(evaluator.held_out), model, terminated)


def _log_teacher_events(items: Iterator[StreamItem], stream: ExampleStream, metrics: Metrics) -> Iterator[StreamItem]:
    """Yield the items, and write teacher events to the metrics file before each item and before an error.

    With several processes the events of rank 0 are written.
    """

    def write() -> None:
        for event in stream.events():
            metrics.write(TEACHER_EVENTS[event.kind](teacher=event.teacher, detail=event.detail))

    try:
        for item in items:
            write()
            yield item
    except Exception:
        write()
        raise


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
