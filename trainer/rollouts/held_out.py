"""Evaluation of the student by continuations of held-out prompts. The teachers score the continuations.

The prompts and the random numbers are the same at every evaluation, so that the values of a run can be compared. Those
of its steps cannot: each step has other prompts.
"""

from collections.abc import Callable, Sequence

import numpy as np

from alignment.report import bits_per_byte
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.evaluation.agreement import agreement_samples
from trainer.records import Sample, ScoredSample
from trainer.rollouts.batches import open_engine
from trainer.rollouts.prompts import PromptBuilder
from trainer.sources.corpus import Samples
from trainer.sources.sample_order import HELD_OUT
from trainer.student.model import Student
from trainer.telemetry.event_records import finite
from trainer.telemetry.events import RolloutEvalEvent
from trainer.telemetry.jsonl import Metrics
from trainer.tokenization import SampleTokenizer

Score = Callable[[Sequence[Sample]], list[ScoredSample]]


class HeldOutRollouts:
    """Evaluates the student by its continuations of held-out prompts. All processes call `evaluate` together."""

    def __init__(
        self, config: RunConfig, held_out: Samples, student: Student, tokenizer: SampleTokenizer, ranks: Ranks
    ) -> None:
        self._names = [teacher.name for teacher in config.teachers]
        self._student = student
        self._ranks = ranks
        self._seed = config.train.seed
        self._evaluated: int | None = None  # step of the last evaluation
        self._prompts: list[Sample] = []
        if config.rollout is not None and config.rollout.eval_prompts:
            self._builder = PromptBuilder(tokenizer, config.rollout, config.data.window_tokens)
            self._engine = open_engine(config.rollout)
            samples = ranks.shard(agreement_samples(held_out, config.rollout.eval_prompts))
            prompts = [self._builder.with_prompt(sample) for sample in samples]
            self._prompts = [prompt for prompt in prompts if prompt.refusal is None]
        self._is_used = ranks.any(bool(self._prompts))

    def evaluate(self, metrics: Metrics, step: int, score: Score) -> None:
        """Sample, have the teachers score, and write an event, unless there are no prompts or this step has one."""
        if not self._is_used or self._evaluated == step:
            return
        self._evaluated = step
        samples = self._sample(step)
        sums = self._ranks.all_reduce_sum([*_own_sums(samples), *_teacher_sums(score(samples), len(self._names))])
        num_samples, num_tokens, num_bytes, nats, entropy, finished, *by_teacher = sums
        teachers = {
            name: finite(bits_per_byte(logprob, int(covered)))
            for name, logprob, covered in zip(self._names, by_teacher[::2], by_teacher[1::2], strict=True)
        }
        event = RolloutEvalEvent(
            step=step,
            samples=int(num_samples),
            own_bpb=finite(bits_per_byte(-nats, int(num_bytes))),
            entropy=entropy / max(num_tokens, 1),
            length=num_tokens / max(num_samples, 1),
            finished=finished / max(num_samples, 1),
            teachers=teachers,
        )
        metrics.write(event)

    def _sample(self, version: int) -> list[Sample]:
        seed = (self._seed, HELD_OUT, self._ranks.rank)
        inputs = [self._builder.prompt(prompt) for prompt in self._prompts]
        sampled = self._engine.sample(self._student, inputs, seed, lambda: False)
        return [
            self._builder.sample(prompt, self._builder.rollout(prompt, tokens, version))
            for prompt, tokens in zip(self._prompts, sampled, strict=True)
        ]


def _own_sums(samples: Sequence[Sample]) -> list[float]:
    """Return the number of rollouts, their tokens, bytes, nats and entropy, and the number of finished rollouts."""
    rollouts = [sample.rollout for sample in samples if sample.rollout is not None]
    return [
        len(rollouts),
        sum(len(each.ids) for each in rollouts),
        sum(sum(each.num_bytes) for each in rollouts),
        -sum(sum(each.logprobs) for each in rollouts),
        sum(sum(each.entropies) for each in rollouts),
        sum(each.finish != "length" for each in rollouts),
    ]


def _teacher_sums(scored: Sequence[ScoredSample], num_teachers: int) -> list[float]:
    """Return the log-likelihood and the bytes of each teacher, one teacher after another."""
    sums = np.zeros((num_teachers, 2))
    for sample in scored:
        sums += [scores.supervised_text for scores in sample.scores]
    return sums.ravel().tolist()
