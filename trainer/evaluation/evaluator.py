"""Evaluation during a run: bits per byte and agreement on held-out text, early stopping, and export of the student.

A resumed run reads its earlier results from its metrics file, up to the step from which it resumes.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from teachers.model_dirs import name_of
from teachers.protocol.messages import TeacherCard
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.evaluation.agreement import agreement, agreement_samples, fuse_held_out
from trainer.evaluation.bits_per_byte import evaluate_domains, figures, held_out_domains
from trainer.evaluation.export import export_model, save_card
from trainer.evaluation.model_card import model_card
from trainer.fusion.run_fuser import Fuser, check_routes
from trainer.query.stream import ExampleStream
from trainer.records import ScoredSample
from trainer.report.history import read_history
from trainer.report.summary import held_out_curve
from trainer.sources.corpus import Corpus
from trainer.student.model import Student
from trainer.telemetry.events import EvalEvent, ExportEvent
from trainer.telemetry.jsonl import METRICS_FILE, Metrics
from trainer.tokenization import SampleTokenizer

Exported = tuple[int, float | None] | None  # step and held-out bits per byte of the weights in model/
CARD_FACTS = {"model", "revision", "fingerprint", "tokenizer_sha256", "vocab_size", "engine", "dtype"}
SOFTWARE = ("tutelage", "torch", "transformers")


@dataclass(frozen=True)
class TeacherSnapshot:
    """The teachers at the start of a run: the card of each, and its scores of the samples for agreement.

    Scores are kept in memory only. A sample of 512 tokens at K = 64 takes about 0.3 MB per teacher.
    """

    cards: Mapping[str, TeacherCard] = field(default_factory=dict)
    scored: Sequence[ScoredSample] = ()


@dataclass(frozen=True)
class Earlier:
    """Results of a run before it was resumed.

    bpb       held-out bits per byte by step
    exported  step and bits per byte of the weights in model/; None without model/
    start     values of the last start event
    """

    bpb: Mapping[int, float] = field(default_factory=dict)
    exported: Exported = None
    start: Mapping[str, Any] = field(default_factory=dict)


class Evaluator:
    """Evaluates and exports the student of a run that starts after `done` of `num_steps` steps.

    All processes call the same methods in the same order.

    held_out  (step, bits per byte) of each evaluation since this start
    earlier   results before the run was resumed
    """

    def __init__(
        self,
        config: RunConfig,
        student: Student,
        tokenizer: SampleTokenizer,
        corpus: Corpus,
        *,
        ranks: Ranks,
        done: int,
        num_steps: int,
    ) -> None:
        self._config = config
        self._student = student
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._ranks = ranks
        self._num_steps = num_steps
        self._domains = held_out_domains(corpus, tokenizer, config.data)
        self._teachers = TeacherSnapshot()
        self._out = Path(config.output.dir).expanduser()
        self.held_out: list[tuple[int, float]] = []
        self.earlier = ranks.broadcast(_earlier(self._out, done) if ranks.first else Earlier())
        self._bpb = dict(self.earlier.bpb)
        self._exported = self.earlier.exported

    @property
    def early_stopped(self) -> bool:
        """Whether the run should end because held-out text has not improved (eval.early_stopping_patience)."""
        patience, min_delta = self._config.eval.early_stopping_patience, self._config.eval.early_stopping_min_delta
        return patience is not None and evaluations_since_best(list(self._bpb.values()), min_delta) >= patience

    def reason(self, step: int) -> str | None:
        """Return the reason for which a run ended early, after `step` steps; None if it did not end early."""
        if not self.early_stopped or step == self._num_steps:
            return None
        patience = self._config.eval.early_stopping_patience
        return f"held-out text has not improved in {patience} evaluations (eval.early_stopping_patience)"

    def snapshot_teachers(self, stream: ExampleStream) -> Mapping[str, TeacherCard]:
        """Store the teachers' cards, and score the samples for agreement through the connection of the stream.

        Returns the cards. Raises TeacherError, and DataError for a sample that the fusion method cannot weigh.
        """
        samples = agreement_samples(self._corpus.held_out, self._config.eval.agreement_samples)
        if samples:
            check_routes(self._corpus.held_out, self._config)
        ranks = self._ranks
        snapshot = TeacherSnapshot(stream.cards, stream.score(samples)) if ranks.first else TeacherSnapshot()
        self._teachers = ranks.broadcast(snapshot)
        return self._teachers.cards

    def facts(self) -> dict[str, Any]:
        """Return the values of a start event that concern evaluation and the model card."""
        num_tokenized = sum(map(len, self._domains.values()))
        name, revision = name_of(self._student.folder.absolute())
        return {
            "held_out": num_tokenized,
            "held_out_skipped": len(self._corpus.held_out) - num_tokenized,
            "base": {"model": name, "revision": revision},
            "teachers": {key: card.model_dump(include=CARD_FACTS) for key, card in self._teachers.cards.items()},
            "software": {"python": platform.python_version(), **{name: version(name) for name in SOFTWARE}},
        }

    def evaluate(self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None = None) -> None:
        """Evaluate the student after `step` steps. With output.export = "best", export weights that are the best.

        Does nothing without held-out text, or if the last evaluation was at this step. fusion_state is the state of the
        run's fusion after these steps. Raises NonFiniteLoss if the student has diverged.
        """
        if not self._domains or (self.held_out and self.held_out[-1][0] == step):
            return
        values = figures(evaluate_domains(self._student, self._domains, self._config.loss.chunk_tokens, self._ranks))
        bpb = values["held_out_bpb"]
        metrics.write(EvalEvent(step=step, **values, **self._agreement(step, fusion_state)))
        self.held_out.append((step, bpb))
        self._bpb.setdefault(step, bpb)  # a resumed run evaluates the step that it resumes from again
        best = math.inf if self._exported is None or self._exported[1] is None else self._exported[1]
        if self._config.output.export == "best" and bpb < best:
            self._export(metrics, step)

    def _agreement(self, step: int, fusion_state: dict[str, Any] | None) -> Mapping[str, Any]:
        config, scored = self._config, self._teachers.scored
        make_fuser = partial(Fuser, config, len(self._student.vocabulary), self._num_steps, fusion_state)
        fused = fuse_held_out(make_fuser, scored, config.train.batch_samples, step)
        names = [teacher.name for teacher in config.teachers]
        return agreement(self._student, scored, fused, names, config.loss.chunk_tokens)

    def finish(self, metrics: Metrics, step: int) -> Path:
        """Write model/ with the last or the best weights and a card of the whole run. Return the folder."""
        folder = self._out / "model"
        if self._config.output.export == "last" or self._exported is None:
            self._export(metrics, step)
        elif self._ranks.first:
            save_card(model_card(read_history(self._out), *self._exported), folder)
        return folder

    def _export(self, metrics: Metrics, step: int) -> None:
        bpb, weights = self._bpb.get(step), self._student.weights()
        if self._ranks.first:
            card = model_card(read_history(self._out), step, bpb)
            export_model(self._student, weights, self._tokenizer, self._out / "model", card)
        self._exported = step, bpb
        metrics.write(ExportEvent(step=step, held_out_bpb=bpb))


def _earlier(out: Path, done: int) -> Earlier:
    """Return the results up to step `done`; empty results if the run starts at step 0.

    model/ may contain the weights of a step after `done`, if the run was killed. The bits per byte of its export event
    still count: only better weights replace it.
    """
    # At step 0 no checkpoint was loaded, so the student may differ from that of the metrics file.
    if not done or not (out / METRICS_FILE).is_file():
        return Earlier()
    history = read_history(out)
    steps, bpb = held_out_curve(history) or (np.empty(0, int), np.empty(0))
    known = {step: value for step, value in zip(steps.tolist(), bpb.tolist(), strict=True) if step <= done}
    return Earlier(known, history.exported if (out / "model").is_dir() else None, history.start)


def evaluations_since_best(bpb: Sequence[float], min_delta: float) -> int:
    """Return the number of evaluations since the best one. An improvement is larger than min_delta."""
    best, since = math.inf, 0
    for value in bpb:
        since += 1
        if value < best - min_delta:
            best, since = value, 0
    return since
