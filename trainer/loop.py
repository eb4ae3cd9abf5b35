"""A run from beginning to end: next batch, step, log, evaluate, save."""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from trainer.checkpoint import (
    Kept,
    identity_of,
    latest_checkpoint,
    load_checkpoint,
    load_fusion_state,
    save_checkpoint,
)
from trainer.config import RunConfig
from trainer.data import Corpus, Sample, load_corpus
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.evaluate import evaluate
from trainer.fuser import Fuser, check_routes
from trainer.metrics import Listener, Metrics
from trainer.order import batch_indices
from trainer.pipeline import Batch, TargetStream, labels_of
from trainer.reading import Reader, readable
from trainer.step import StepResult, make_optimizer, plan_step, train_step
from trainer.student import Student, load_student, reader_of
from trainer.tracking import check_trackers, tracked


@dataclass(frozen=True)
class RunResult:
    """Held-out bits per byte as (step, bpb), since this start; where the student was exported, if the run ended."""

    steps: int
    held_out: tuple[tuple[int, float], ...]
    model: Path | None


def train(
    config: RunConfig, *, resume: bool = False, stop_at: int | None = None, listener: Listener | None = None
) -> RunResult:
    """Run to the end, or save and leave after step `stop_at`. Raises the errors of trainer, teachers, alignment."""
    out = Path(config.output.dir).expanduser()
    last = latest_checkpoint(out / "checkpoints")
    if out.is_file():
        raise ConfigError(f"output.dir: {out} is a file")
    if out.exists() and any(out.iterdir()) and not resume:
        raise CheckpointError(f"{out} already holds a run: continue it with --resume or choose another output.dir")
    check_trackers(config.tracking)
    torch.manual_seed(config.train.seed)
    student = load_student(config.student)
    longest = config.data.window_tokens + config.data.close_documents
    if longest > student.max_tokens:
        closing = " with EOS" if config.data.close_documents else ""
        raise ConfigError(f"data.window_tokens is {longest}{closing}, the student takes {student.max_tokens}")
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    check_routes(corpus.train, config)
    optimizer = make_optimizer(student, config.optim)
    identity = identity_of(config, student, corpus)
    done = load_checkpoint(last, student, optimizer, identity) if resume and last else 0
    num_steps = total_steps(config, corpus)
    end = min(num_steps, stop_at or num_steps)
    reader = reader_of(student.folder, student.vocabulary, config)
    run = _Run(config, student, reader, corpus)
    fusion_state = load_fusion_state(last) if resume and last else None
    fuser = Fuser(config, len(student.vocabulary), num_steps, fusion_state)

    with TargetStream(config, reader, _batches(config, corpus, done, end), fuser=fuser, first_step=done) as stream:
        batches = iter(stream)
        first = list(islice(batches, 1))  # nothing is written before every teacher has been checked
        make_folder(out)
        with tracked(config, done) as trackers, Metrics(out / "metrics.jsonl", listener, *trackers) as metrics:
            metrics.emit(
                "start",
                step=done,
                steps=num_steps,
                samples=len(corpus.train),
                connect_s=stream.connect_s,
                sources=[asdict(source) for source in corpus.sources],
                **run.counts,
                run=config.model_dump(),
            )
            run.measure(metrics, done)
            for batch in noted(chain(first, batches), stream, metrics):
                began = time.monotonic()
                plan = plan_step(config, done, num_steps)
                result = train_step(student, optimizer, batch.lessons, plan)
                done += 1
                step_s = time.monotonic() - began
                metrics.emit(
                    "step",
                    step=done,
                    ce_weight=plan.objective.ce_weight,
                    **step_values(config, student, batch, result, step_s),
                )
                if done == end or _due(done, config.eval.every_steps):
                    run.measure(metrics, done)
                if done == end or _due(done, config.output.checkpoint_every_steps):
                    kept = Kept(identity, batch.fusion_state)
                    keep = config.output.keep_checkpoints
                    save_checkpoint(out / "checkpoints", done, student, optimizer, kept, keep=keep)
                    metrics.emit("checkpoint", step=done)
            model = run.export(out / "model") if done == num_steps else None
            metrics.emit("end", step=done, model=str(model) if model else None)
    return RunResult(done, tuple(run.held_out), model)


def make_folder(out: Path) -> None:
    """Make the run's folder. Raises ConfigError if it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot make {out}: {error.strerror}") from error


class _Run:
    """What measuring and exporting need."""

    def __init__(self, config: RunConfig, student: Student, reader: Reader, corpus: Corpus) -> None:
        self._config = config
        self._student = student
        self._samples = list(readable(corpus.held_out, reader, config.data))
        self.num_skipped = len(corpus.held_out) - len(self._samples)
        if corpus.held_out and not self._samples:
            raise DataError(f"none of the {len(corpus.held_out)} held-out chats can be read: see data.broken_chats")
        self.held_out: list[tuple[int, float]] = []

    @property
    def counts(self) -> dict[str, int]:
        return {"held_out": len(self._samples), "held_out_skipped": self.num_skipped}

    def measure(self, metrics: Metrics, step: int) -> None:
        if self._samples and not (self.held_out and self.held_out[-1][0] == step):
            result = evaluate(self._student, self._samples, self._config.loss.chunk_tokens)
            self.held_out.append((step, result.bpb))
            per_token = result.nats / result.num_tokens
            metrics.emit("eval", step=step, held_out_bpb=result.bpb, held_out_nats_per_token=per_token)

    def export(self, folder: Path) -> Path:
        partial = folder.with_name(".partial-model")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            self._student.export(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"cannot export to {folder} ({error}): make room, then run with --resume") from error
        return folder


def total_steps(config: RunConfig, corpus: Corpus) -> int:
    """Whole batches in all epochs, or train.steps if that is fewer. Raises DataError if there is no whole batch."""
    in_epochs = config.train.epochs * corpus.order.epoch_samples // config.train.batch_samples
    steps = min(in_epochs, config.train.steps or in_epochs)
    if steps == 0:
        raise DataError(
            f"{corpus.order.epoch_samples} samples in {config.train.epochs} epochs do not fill one batch of "
            f"{config.train.batch_samples}: lower train.batch_samples or give more text"
        )
    return steps


def _batches(config: RunConfig, corpus: Corpus, begin: int, end: int) -> Iterator[list[Sample]]:
    for step in range(begin, end):
        yield [corpus.train[i] for i in batch_indices(corpus.order, config.train.batch_samples, step)]


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
    return values | {
        "divergence": result.divergence,
        "coverage": valid / sum(len(t) for t in targets),
        "mass": sum(float(t.mass.sum()) for t in targets) / max(valid, 1),
        "tail": sum(float(t.tail.sum()) for t in targets) / max(valid, 1),
        "vanished": sum(lesson.vanished for lesson in batch.lessons),
        "teachers": teachers,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN; a figure over no bytes is absent."""
    return value if math.isfinite(value) else None
