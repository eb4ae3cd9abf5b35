"""The fusion of one run: what its file says, step by step, in the order of the batches.

Most of it is a function of a batch and its step. `adaptive` also goes by what was seen before, so batches are fused in
their order, and what was seen is state that a checkpoint keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment import Target, Tokens
from alignment.report import AlignmentReport
from alignment.unaligned import SortedProbs, SpanLikelihoods
from trainer.config import FusionConfig, RunConfig
from trainer.data.reading import Reading
from trainer.data.samples import Sample, Samples
from trainer.errors import CheckpointError, DataError
from trainer.targets.asking import Asked
from trainer.targets.fusion import METHODS, Aligned, Fused, Gathered, Rule, alone, fuse, text_nats
from trainer.targets.priors import RunningBpb, routed, scheduled


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the student learns from one sample; `target` is None where no teacher is fused.

    shares, reports, left_out  of each teacher: its part of what all say, how it arrived, positions it had no answer for
    absent                     of each teacher: whether it was lost when the sample was asked for
    vanished                   positions where a geometric mean left nothing and the arithmetic one stands in
    shortened                  whether some model could not take the sample whole
    unaligned                  of each teacher: what it says, where that is not a part of the target
    """

    sample: Sample
    reading: Reading
    target: Target | None = None
    shares: tuple[float, ...] = ()
    reports: tuple[AlignmentReport, ...] = ()
    left_out: tuple[int, ...] = ()
    absent: tuple[bool, ...] = ()
    vanished: int = 0
    shortened: bool = False
    unaligned: tuple[SpanLikelihoods | SortedProbs | None, ...] = ()

    @property
    def tokens(self) -> Tokens:
        return self.reading.tokens


def rule_of(fusion: FusionConfig, top_k: int | None) -> Rule:
    """`adaptive` and `router` are means whose weights are chosen before."""
    method = fusion.method if fusion.method in METHODS else "mean"
    return Rule(method, fusion.scope, fusion.temperature, top_k)


def part_shares(config: RunConfig, progress: float) -> NDArray[np.float64]:
    """[N] what each teacher weighs at a progress of 0 to 1 through the run; they sum to 1."""
    if not config.teachers:
        return np.zeros(0)
    weights = [teacher.weight for teacher in config.teachers]
    last = [teacher.last_weight for teacher in config.teachers]
    return scheduled(weights, last, config.fusion.schedule, progress)


def _continued(running: RunningBpb, state: dict[str, Any]) -> RunningBpb:
    """With what was seen before, by the names of the teachers. Raises CheckpointError if they are others."""
    before = RunningBpb.from_state(state)
    if sorted(before.names) != sorted(running.names):
        raise CheckpointError(
            f"the checkpoint's adaptive fusion has seen the teachers {', '.join(before.names)}, this run has "
            f"{', '.join(running.names)}"
        )
    order = [before.names.index(name) for name in running.names]
    seen = {domain: tuple(averages[i] for i in order) for domain, averages in before.seen.items()}
    return replace(running, seen=seen)


def check_routes(samples: Samples, config: RunConfig) -> None:
    """Raise DataError for a sample that a router could send to nobody."""
    names = [teacher.name for teacher in config.teachers]
    for teacher, sample in samples.teachers().items() if names and config.fusion.method == "router" else ():
        if teacher not in names:
            raise DataError(f"sample {sample}: router: expected one of {', '.join(names)}, received {teacher!r}")


class Fuser:
    """Fuses batches in their order; what teachers say whose tokens are not translated is handed through.

    vocab_size is the student's; num_steps is the length of the schedule of weights; state is what an earlier Fuser
    of the same run has left; without `cut`, rows keep all their entries. With parts of a batch in several processes
    each has a Fuser, and `gathered` gives what all of them say, in the order of their parts.
    """

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        num_steps: int = 1,
        state: dict[str, Any] | None = None,
        *,
        cut: bool = True,
        gathered: Gathered = alone,
    ):
        self._gathered = gathered
        self._config = config
        self._fused_N = np.array([teacher.is_fused for teacher in config.teachers], dtype=bool)
        self._names = tuple(teacher.name for teacher in config.teachers if teacher.is_fused)
        self._vocab_size = vocab_size
        self._num_steps = num_steps
        self._rule = rule_of(config.fusion, config.fusion.top_k if cut else None)
        fusion = config.fusion
        self._running = None
        if fusion.method == "adaptive":
            fresh = RunningBpb(self._names, fusion.half_life_bytes, fusion.margin_bpb, fusion.temperature)
            self._running = _continued(fresh, state) if state else fresh

    @property
    def state(self) -> dict[str, Any] | None:
        """What a later Fuser needs to go on, as JSON has it; None where there is nothing."""
        return self._running.state() if self._running else None

    def fuse(self, batch: Sequence[Asked], step: int = 0) -> tuple[Lesson, ...]:
        """The lessons of one batch, the `step`-th from 0. `check_routes` has been passed."""
        if not self._config.teachers:
            return tuple(Lesson(asked.sample, asked.reading, shortened=asked.shortened) for asked in batch)
        static_N = part_shares(self._config, min(step / max(self._num_steps - 1, 1), 1.0))
        if not static_N[self._fused_N].any():
            return tuple(self._lesson(asked, static_N) for asked in batch)
        aligned = [self._aligned(asked, static_N[self._fused_N]) for asked in batch]
        fused = fuse(aligned, self._rule, self._vocab_size, self._gathered)
        if self._running is not None:
            texts = [text_nats(sample, self._vocab_size) for sample in aligned]
            heard = [(asked.sample.domain, *text) for asked, text in zip(batch, texts, strict=True)]
            for domain, nats, num_bytes in chain.from_iterable(self._gathered(heard)):
                self._running = self._running.updated(domain, nats, num_bytes)
        return tuple(self._lesson(asked, static_N, one) for asked, one in zip(batch, fused, strict=True))

    def _lesson(self, asked: Asked, static_N: NDArray[np.float64], fused: Fused | None = None) -> Lesson:
        """A teacher that is not fused has the share of its weight where it has answered."""
        answers = asked.answers
        shares_N = np.where([a.unaligned is not None for a in answers], static_N, 0) / static_N.sum()
        left_out_N = np.zeros(len(answers), dtype=np.int64)
        if fused is not None:
            shares_N[self._fused_N] = fused.shares_N * (static_N[self._fused_N].sum() / static_N.sum())
            left_out_N[self._fused_N] = fused.left_out_N
        return Lesson(
            asked.sample,
            asked.reading,
            None if fused is None else fused.target,
            tuple(shares_N.tolist()),
            tuple(answer.report for answer in answers),
            tuple(left_out_N.tolist()),
            tuple(answer.absent for answer in answers),
            0 if fused is None else fused.num_vanished,
            asked.shortened,
            tuple(answer.unaligned for answer in answers),
        )

    def _aligned(self, asked: Asked, static: NDArray[np.float64]) -> Aligned:
        answers = [answer for answer, is_fused in zip(asked.answers, self._fused_N, strict=True) if is_fused]
        return Aligned(
            targets=tuple(answer.target for answer in answers),
            labels_T=asked.reading.tokens.ids,
            num_bytes_T=asked.reading.num_bytes_T,
            prior_N=self._prior(asked.sample, static, [bool(answer.target.valid.any()) for answer in answers]),
            own_ce_N=np.array([answer.nats_per_token for answer in answers]),
        )

    def _prior(self, sample: Sample, static: NDArray[np.float64], heard: Sequence[bool]) -> NDArray[np.float64]:
        """What each teacher weighs in this sample; of those that were heard, some, unless a column names another."""
        if self._config.fusion.method == "router":
            return routed(self._names, sample.teacher or "")
        if self._running is None:
            return static
        prior = static * self._running.weights(sample.domain)
        return prior if prior[np.array(heard)].any() else static
