"""What a run has at hand: made once and checked before anything is spent, and saved."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import (
    Checkpoints,
    Identity,
    Kept,
    identity_of,
    latest_checkpoint,
    load_checkpoint,
    load_fusion_state,
)
from trainer.config import RunConfig
from trainer.data.reading import Reader
from trainer.data.samples import Corpus, load_corpus
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.learning.step import make_optimizer
from trainer.learning.student import Student, load_student, reader_of
from trainer.ranks import Ranks
from trainer.reports.metrics import Listener, Metrics
from trainer.reports.tracking import check_trackers, tracked
from trainer.results.outcome import Outcome
from trainer.targets.fuser import Fuser, check_routes

log = logging.getLogger("tutelage.run")


@dataclass(frozen=True, eq=False)
class Run:
    """One start of a run: `done` of num_steps steps were done before it. Every rank has one and calls it alike."""

    config: RunConfig
    ranks: Ranks
    student: Student
    reader: Reader
    corpus: Corpus
    outcome: Outcome
    optimizer: torch.optim.Optimizer
    fuser: Fuser
    checkpoints: Checkpoints
    identity: Identity
    num_steps: int
    done: int
    saved: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.config.output.dir).expanduser()

    @contextmanager
    def opened(self, listener: Listener | None, connect_s: float) -> Iterator[Metrics]:
        """The run's folder and its metrics, which the first rank writes. connect_s: what reaching the teachers took."""
        make_folder(self.folder, self.ranks)
        with ExitStack() as stack:
            listeners = stack.enter_context(tracked(self.config, self.done)) if self.ranks.first else []
            path = self.folder / "metrics.jsonl" if self.ranks.first else None
            metrics = stack.enter_context(Metrics(path, listener, *listeners))
            stack.enter_context(self.checkpoints)
            metrics.emit("start", step=self.done, connect_s=connect_s, run=self.config.model_dump(), **self._counts())
            yield metrics

    def _counts(self) -> dict[str, Any]:
        return {
            "steps": self.num_steps,
            "ranks": self.ranks.size,
            "samples": len(self.corpus.train),
            "sources": [asdict(source) for source in self.corpus.sources],
            "identity": dict(self.identity),
            **self.outcome.facts(),
        }

    def save(self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None) -> None:
        """Begin to write a checkpoint, once the one before it is written; training goes on."""
        self._say(metrics, self.checkpoints.finish())
        self.checkpoints.save(step, self.student, self.optimizer, Kept(self.identity, fusion_state))
        self.saved.append(step)

    def settle(self, metrics: Metrics) -> None:
        """Take in a checkpoint that has been written meanwhile."""
        self._say(metrics, self.checkpoints.settle())

    def leave(self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None) -> None:
        """Have everything up to this step on disk."""
        if step > self.done and step not in self.saved:
            self.save(metrics, step, fusion_state)
        self._say(metrics, self.checkpoints.finish())

    def _say(self, metrics: Metrics, written: int | None) -> None:
        if written is not None:
            metrics.emit("checkpoint", step=written)


def begin(config: RunConfig, ranks: Ranks, resume: bool) -> Run:
    """Everything but the teachers. Raises before anything is written."""
    out = Path(config.output.dir).expanduser()
    last = ranks.agreed(latest_checkpoint(out / "checkpoints")) if resume else None
    _check(config, ranks, out, resume)
    if resume and last is None and ranks.first:
        log.warning("%s holds no checkpoint: the run begins at step 0", out)
    torch.manual_seed(config.train.seed)  # of new adapters
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    student = load_student(config.student, ranks)
    longest = config.data.window_tokens + config.data.close_documents
    if longest > student.max_tokens:
        closing = " with EOS" if config.data.close_documents else ""
        raise ConfigError(f"data.window_tokens is {longest}{closing}, the student takes {student.max_tokens}")
    with ranks.one_before_the_others():
        corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    check_routes(corpus.train, config)
    reader = reader_of(student.folder, student.vocabulary, config)
    optimizer = make_optimizer(student, config.optim)
    identity = identity_of(config, student, corpus)
    check_alike(ranks.gathered(facts_of(config, identity)))
    done = load_checkpoint(last, student, optimizer, identity, ranks) if last else 0
    num_steps = total_steps(config, corpus)
    fusion_state = load_fusion_state(last) if last else None
    fuser = Fuser(config, len(student.vocabulary), num_steps, fusion_state, gathered=ranks.gathered_fusing)
    checkpoints = Checkpoints(out / "checkpoints", config.output.keep_checkpoints, ranks)
    outcome = Outcome(config, student, reader, corpus, ranks=ranks, done=done, num_steps=num_steps)
    return Run(
        config, ranks, student, reader, corpus, outcome, optimizer, fuser, checkpoints, identity, num_steps, done
    )


def _check(config: RunConfig, ranks: Ranks, out: Path, resume: bool) -> None:
    """What can be refused before a model is loaded."""
    if config.train.batch_samples < ranks.size:
        raise ConfigError(f"train.batch_samples is {config.train.batch_samples}, fewer than the {ranks.size} processes")
    if out.is_file():
        raise ConfigError(f"output.dir: {out} is a file")
    if ranks.agreed(out.exists() and any(out.iterdir())) and not resume:
        raise CheckpointError(f"{out} already holds a run: continue it with --resume or choose another output.dir")
    check_trackers(config.tracking)


def facts_of(config: RunConfig, identity: Identity) -> dict[str, Any]:
    """What every rank must have alike, by name."""
    sections = config.model_dump(mode="json")
    teachers = sections.pop("teachers")
    settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {"teachers": teachers, **settings, **identity}


def check_alike(facts_of_ranks: Sequence[Identity]) -> None:
    """Raise ConfigError, on all ranks, where one of them would train something else."""
    first = facts_of_ranks[0]
    for rank, facts in enumerate(facts_of_ranks):
        for key, value in facts.items():
            if value != first[key]:
                raise ConfigError(
                    f"process 0 has {key} = {first[key]!r}, process {rank} has {value!r}: all machines need the same "
                    "run file, student and data"
                )


def make_folder(out: Path, ranks: Ranks = Ranks()) -> None:
    """Make the run's folder. Raises ConfigError if it cannot be made, or if not all ranks have the same one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        blind = ranks.blind_to(out)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot make {error.filename or out}: {error.strerror}") from error
    if blind:
        raise ConfigError(
            f"output.dir is {out}, where process {blind[0]} does not see what process 0 writes: give a folder on a "
            "disk that all machines share"
        )


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
