"""The objects of a run, created and checked before anything is written, and the calls that save its checkpoints."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from teachers.protocol.messages import TeacherCard
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.evaluator import Evaluator
from trainer.fusion.run_fuser import Fuser
from trainer.rollouts.batches import OnPolicyBatches, WaitingRollouts, waiting_rollouts
from trainer.rollouts.held_out import HeldOutRollouts, Score
from trainer.sources.corpus import Corpus, unclosed_texts
from trainer.student.loading import load_student, resolve_precision, student_tokenizer
from trainer.student.model import Student
from trainer.telemetry.events import CheckpointEvent, StartEvent
from trainer.telemetry.jsonl import METRICS_FILE, Listener, Metrics
from trainer.telemetry.tracking import open_trackers
from trainer.tokenization import SampleTokenizer
from trainer.training.batches import Batches, CorpusBatches
from trainer.training.chat_checks import check_chats, describe_supervision
from trainer.training.checkpoint import Checkpoints, load_checkpoint
from trainer.training.checkpoint_folder import CheckpointMetadata, newest_intact
from trainer.training.identity import (
    Identity,
    base_weights_sha256,
    changed_results,
    changed_settings,
    check_identity,
    check_num_steps,
    check_same_settings,
    check_same_teachers,
    process_settings,
    run_identity,
)
from trainer.training.optimizer import make_optimizer
from trainer.training.run_lock import LOCK_FILE, NoLock, RunLock
from trainer.training.start_checks import check_data, check_settings, check_student, unreached_steps

log = logging.getLogger("tutelage.run")


@dataclass(frozen=True, eq=False)
class Run:
    """The objects of one start of a run. All processes call the same methods in the same order.

    precision  bf16 or fp32, as resolved at the run's first start
    num_steps  number of steps of the whole run
    done       number of steps before this start
    lock       the lock on the run's folder, checked before anything is written
    remarks    remarks about the data, and about the chats for the student
    saved      steps with a checkpoint since this start
    """

    config: RunConfig
    ranks: Ranks
    student: Student
    tokenizer: SampleTokenizer
    corpus: Corpus
    evaluator: Evaluator
    held_out_rollouts: HeldOutRollouts
    optimizer: torch.optim.Optimizer
    fuser: Fuser
    checkpoints: Checkpoints
    identity: Identity
    precision: str
    num_steps: int
    done: int
    lock: RunLock
    remarks: tuple[str, ...] = ()
    waiting_rollouts: WaitingRollouts = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output.dir).expanduser()

    def batches(self, steps: range) -> Batches:
        """Return the batches of some steps."""
        if self.config.rollout is None:
            return CorpusBatches(self.corpus, self.config.train, self.ranks, steps)
        return OnPolicyBatches(
            self.config,
            self.corpus,
            self.student,
            self.tokenizer,
            self.ranks,
            steps,
            num_steps=self.num_steps,
            waiting=self.waiting_rollouts,
        )

    def check_teachers(self, cards: Mapping[str, TeacherCard]) -> None:
        """Raise ConfigError if a teacher is another model than before the run was resumed."""
        check_same_teachers(self.evaluator.earlier.start, cards)

    def check_chats(self, teachers: Mapping[str, SampleTokenizer]) -> list[str]:
        """Check the chats for every teacher, and return the remarks about the data, the student and the teachers.

        Raises DataError or ChatError.
        """
        models = {f"teacher {name}": tokenizer for name, tokenizer in teachers.items()}
        return [*self.remarks, *check_chats(self.corpus, models, self.config.data)]

    @contextmanager
    def opened(self, listener: Listener | None, connect_s: float, remarks: Sequence[str] = ()) -> Iterator[Metrics]:
        """Create the run's folder, open metrics file and trackers on rank 0, and write the start event.

        connect_s is the time that connecting to the teachers took, in seconds; remarks are those of `check_chats`.
        """
        make_folder(self.folder, self.ranks)
        with ExitStack() as stack:
            listeners = stack.enter_context(open_trackers(self.config, self.done)) if self.ranks.first else []
            path = self.folder / METRICS_FILE if self.ranks.first else None
            metrics = stack.enter_context(Metrics(path, listener, *listeners, before_write=self.lock.check))
            stack.enter_context(self.checkpoints)
            run = self.config.model_dump(mode="json")
            metrics.write(StartEvent(step=self.done, connect_s=connect_s, run=run, **self._facts(remarks)))
            yield metrics

    def _facts(self, remarks: Sequence[str]) -> dict[str, Any]:
        changed = changed_settings(self.evaluator.earlier.start, self.config)
        return {
            "steps": self.num_steps,
            "ranks": self.ranks.size,
            "precision": self.precision,
            "samples": len(self.corpus.train),
            "sources": [asdict(source) for source in self.corpus.sources],
            "identity": dict(self.identity),
            "remarks": list(remarks),
            "changed": changed,
            "changed_results": changed_results(changed),
            "supervision": describe_supervision(self.corpus, self.config.data),
            **self.evaluator.facts(),
        }

    def evaluate(self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None, score: Score) -> None:
        """Evaluate the student on held-out text and, with rollout.eval_prompts, on its rollouts.

        score  has the teachers score samples
        """
        self.evaluator.evaluate(metrics, step, fusion_state)
        self.held_out_rollouts.evaluate(metrics, step, score)

    def save(self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None, prepared: dict[str, Any]) -> None:
        """Start to write a checkpoint, after the previous one is complete. Training continues while it is written.

        prepared  the state of this process's batches
        """
        self._report(metrics, self.checkpoints.finish())
        rollouts = self.ranks.all_gather(prepared) if self.config.rollout is not None else []
        metadata = CheckpointMetadata(step, self.identity, self.precision, fusion_state, rollouts)
        self.checkpoints.save(self.student, self.optimizer, metadata)
        self.saved.append(step)

    def finish_save(self, metrics: Metrics) -> None:
        """Complete the checkpoint in progress if all processes have written their shards."""
        self._report(metrics, self.checkpoints.finish_if_written())

    def save_last(
        self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None, prepared: dict[str, Any]
    ) -> None:
        """Save a checkpoint of this step unless one exists, and wait until it is complete."""
        if step > self.done and step not in self.saved:
            self.save(metrics, step, fusion_state, prepared)
        self._report(metrics, self.checkpoints.finish())

    def _report(self, metrics: Metrics, written: int | None) -> None:
        if written is not None:
            metrics.write(CheckpointEvent(step=written))


def begin(config: RunConfig, ranks: Ranks, resume: bool, lock: RunLock = NoLock()) -> Run:
    """Load and check everything except the teachers. Errors are raised before anything is written.

    The caller holds `lock`. Without a lock, the returned run must not write.
    """
    out = Path(config.output.dir).expanduser()
    last = newest_intact(out / "checkpoints", ranks) if resume else None
    check_settings(config, ranks.size)
    _check_folder_is_new(out, ranks, resume)
    if resume and last is None and ranks.first:
        log.warning("%s has no checkpoint: the run begins at step 0", out)
    _seed(config)
    check_student(config)
    metadata = last.metadata if last else None
    precision = ranks.broadcast(_precision(config, metadata))  # CPUs may differ in what `auto` resolves to
    student = load_student(config.student.model_copy(update={"precision": precision}), ranks)
    with ranks.local_rank_zero_first():
        corpus, num_steps = check_data(config, student.vocabulary)
    tokenizer = student_tokenizer(student.folder, student.vocabulary, config.student, config.data, corpus.has_chats)
    remarks = unreached_steps(config, num_steps) + unclosed_texts(corpus.sources, config.data)
    remarks += check_chats(corpus, {"student": tokenizer}, config.data)
    optimizer = make_optimizer(student, config.optim)
    weights = base_weights_sha256(student.folder, ranks)
    identity = run_identity(config, weights, student.vocabulary.fingerprint, corpus)
    check_same_settings(ranks.all_gather(process_settings(config, identity)))
    if last:
        check_identity(last.metadata.identity, identity, last.path)
        check_num_steps(last.metadata.step, num_steps)
    done = load_checkpoint(last, student, optimizer, ranks) if last else 0
    fusion_state = metadata.fusion_state if metadata else None
    fuser = Fuser(config, len(student.vocabulary), num_steps, fusion_state, all_gather=ranks.all_gather_fusion)
    if last and fusion_state is None and fuser.state is not None:
        raise CheckpointError(
            f"{last.path} has no state of fusion.method {config.fusion.method}: restore an earlier one"
        )
    return Run(
        config=config,
        ranks=ranks,
        student=student,
        tokenizer=tokenizer,
        corpus=corpus,
        evaluator=Evaluator(config, student, tokenizer, corpus, ranks=ranks, done=done, num_steps=num_steps),
        held_out_rollouts=HeldOutRollouts(config, corpus.held_out, student, tokenizer, ranks),
        optimizer=optimizer,
        fuser=fuser,
        checkpoints=Checkpoints(out / "checkpoints", config.output.keep_checkpoints, ranks, done=done, lock=lock),
        identity=identity,
        precision=precision,
        num_steps=num_steps,
        done=done,
        lock=lock,
        remarks=tuple(remarks),
        waiting_rollouts=waiting_rollouts(metadata.rollouts) if metadata else {},
    )


def _check_folder_is_new(out: Path, ranks: Ranks, resume: bool) -> None:
    try:
        has_content = out.exists() and any(path.name != LOCK_FILE for path in out.iterdir())
    except OSError as error:
        raise ConfigError(f"output.dir: cannot read {out}: {error.strerror}") from error
    if ranks.broadcast(has_content) and not resume:
        raise CheckpointError(f"{out} already contains a run: continue it with --resume or choose another output.dir")


def _seed(config: RunConfig) -> None:
    torch.manual_seed(config.train.seed)  # determines the initial weights of adapters
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _precision(config: RunConfig, metadata: CheckpointMetadata | None) -> str:
    """Return the precision of the run file; for `auto`, that of the checkpoint, or else the choice for the device."""
    if config.student.precision == "auto" and metadata is not None:
        return metadata.precision
    return resolve_precision(config.student.precision, config.student.device)


def make_folder(out: Path, ranks: Ranks = Ranks()) -> None:
    """Create the run's folder. Raises ConfigError if it cannot be created or if the processes do not share it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        not_shared = ranks.ranks_without(out)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot make {error.filename or out}: {error.strerror}") from error
    if not_shared:
        raise ConfigError(
            f"output.dir is {out}, where process {not_shared[0]} does not see what process 0 writes: use a folder on a "
            "disk that all machines share"
        )
