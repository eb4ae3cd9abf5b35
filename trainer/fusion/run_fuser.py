"""The fusion of one run, which converts the scored samples of each batch to training examples.

Most methods are a function of a batch and its step. A method with running state (adaptive) also depends on the batches
before, so batches are fused in order, and a checkpoint keeps the state.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from trainer.config import RunConfig
from trainer.fusion.base import AllGather, FusionMethod, FusionRule, fusion_method, single_process
from trainer.fusion.comparison import text_nats
from trainer.fusion.config import FusionConfig
from trainer.fusion.fuse import FusedTarget, fuse
from trainer.fusion.inputs import Bools, Floats, FusionInput
from trainer.fusion.teacher_weights import scheduled
from trainer.query.config import TeacherConfig
from trainer.records import DistillationExample, ScoredSample
from trainer.sources.corpus import Samples
from trainer.telemetry.collector import Collector


def teacher_weights_at(teachers: Sequence[TeacherConfig], fusion: FusionConfig, progress: float) -> Floats:
    """Return the scheduled weights [N] of the teachers, which sum to 1.

    progress  fraction of the run's steps that are done, from 0 to 1
    """
    if not teachers:
        return np.zeros(0)
    begin, end = [teacher.weight for teacher in teachers], [teacher.end_weight for teacher in teachers]
    return scheduled(begin, end, fusion.schedule, progress)


def fusion_method_of(config: RunConfig) -> FusionMethod | None:
    """Return the fusion method of a run for its fused teachers; None if no teacher is fused."""
    names = [teacher.name for teacher in config.teachers if teacher.is_fused]
    return fusion_method(config.fusion.method)(names, config.fusion) if names else None


def check_routes(samples: Samples, config: RunConfig) -> None:
    """Raise DataError if the fusion method cannot determine the weights of the teachers for one of the samples."""
    method = fusion_method_of(config)
    if method is not None:
        method.check_samples(samples)


class Fuser:
    """Fuse the batches of a run in their order. Scores of teachers that are not fused are passed on unchanged.

    vocab_size  size of the student's vocabulary
    num_steps   number of steps of the schedule of teacher weights
    state       `state` of an earlier Fuser of the same run, to continue it; None at the beginning
    cut         whether rows are cut to fusion.top_k entries
    all_gather  collects a value of the Fusers of all processes, each of which fuses a shard of the batch
    """

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        num_steps: int = 1,
        state: dict[str, Any] | None = None,
        *,
        cut: bool = True,
        all_gather: AllGather = single_process,
    ):
        self._all_gather = all_gather
        self._teachers = config.teachers
        self._fusion = config.fusion
        self._fused_N: Bools = np.array([teacher.is_fused for teacher in config.teachers], dtype=bool)
        self._vocab_size = vocab_size
        self._num_steps = num_steps
        fusion = config.fusion
        self._rule = FusionRule(fusion.method, fusion.scope, fusion.temperature, fusion.top_k if cut else None)
        self._method = fusion_method_of(config)
        if state is not None and self._method is not None:
            self._method.load_state(state)

    @property
    def state(self) -> dict[str, Any] | None:
        """State to continue the run with another Fuser, as JSON values; None if the method has no state."""
        return None if self._method is None else self._method.state()

    def fuse(
        self, batch: Sequence[ScoredSample], step: int = 0, telemetry: Collector | None = None
    ) -> tuple[DistillationExample, ...]:
        """Return the training examples of the batch of one step; steps count from 0. Call `check_routes` first."""
        telemetry = Collector() if telemetry is None else telemetry
        if not self._teachers:
            return tuple(DistillationExample(scored.sample, scored.tokenized) for scored in batch)
        progress = min(step / max(self._num_steps - 1, 1), 1.0)
        weights_N = teacher_weights_at(self._teachers, self._fusion, progress)
        if self._method is None or not weights_N[self._fused_N].any():
            return tuple(self._example(scored, weights_N, None, telemetry) for scored in batch)
        fused = self._fuse(self._method, batch, weights_N[self._fused_N])
        pairs = zip(batch, fused, strict=True)
        return tuple(self._example(scored, weights_N, one, telemetry) for scored, one in pairs)

    def _fuse(self, method: FusionMethod, batch: Sequence[ScoredSample], scheduled_N: Floats) -> list[FusedTarget]:
        inputs = [self._input(method, scored, scheduled_N) for scored in batch]
        fused = fuse(inputs, self._rule, self._vocab_size, self._all_gather)
        if method.observes_text:
            texts = [text_nats(one, self._vocab_size) for one in inputs]
            observed = [(scored.sample.domain, *text) for scored, text in zip(batch, texts, strict=True)]
            for domain, nats_N, bytes_N in chain.from_iterable(self._all_gather(observed)):
                method.observe(domain, nats_N, bytes_N)
        return fused

    def _input(self, method: FusionMethod, scored: ScoredSample, scheduled_N: Floats) -> FusionInput:
        scores = [one for one, is_fused in zip(scored.scores, self._fused_N, strict=True) if is_fused]
        available_N: Bools = np.array([one.target.valid.any() for one in scores], dtype=bool)
        return FusionInput(
            targets=tuple(one.target for one in scores),
            labels_T=scored.tokenized.tokens.ids,
            num_bytes_T=scored.tokenized.num_bytes_T,
            teacher_weights_N=method.teacher_weights(scored.sample, scheduled_N, available_N),
            own_ce_N=np.array([one.nats_per_token for one in scores]),
            keeps_label=scored.sample.written_by is not None,
        )

    def _example(
        self, scored: ScoredSample, weights_N: Floats, fused: FusedTarget | None, telemetry: Collector
    ) -> DistillationExample:
        """Build one training example and record the weights. A teacher that is not fused has its weight if it has
        scores."""
        used_N = np.where([one.auxiliary is not None for one in scored.scores], weights_N, 0) / weights_N.sum()
        missing_N = np.zeros(len(weights_N), dtype=np.int64)
        if fused is not None:
            used_N[self._fused_N] = fused.teacher_weights_N * (weights_N[self._fused_N].sum() / weights_N.sum())
            missing_N[self._fused_N] = fused.missing_N
            telemetry.fallbacks += fused.num_fallbacks
        for teacher, weight, missing in zip(self._teachers, used_N.tolist(), missing_N.tolist(), strict=True):
            telemetry.teacher(teacher.name).weight += weight
            telemetry.teacher(teacher.name).missing += missing
        target = None if fused is None else fused.target
        return DistillationExample(
            scored.sample, scored.tokenized, target, tuple(one.auxiliary for one in scored.scores)
        )
