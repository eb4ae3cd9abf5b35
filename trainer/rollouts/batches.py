"""Batches of an on-policy run. Rollouts of the student replace some or all samples.

The training loop calls `advance` before the first step and after every step. It samples the batches for which the
present weights are recent enough, and queues them for the stream, which has the teachers score them. A batch of step s
is sampled as soon as s − max_staleness_steps steps are done. Nothing is sampled earlier, so that nothing is too old.
"""

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pkgutil import resolve_name
from typing import Any

import numpy as np

from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.fusion.teacher_weights import scheduled
from trainer.records import Rollout, Sample
from trainer.rollouts import ENGINES
from trainer.rollouts.base import RolloutEngine
from trainer.rollouts.config import RolloutConfig
from trainer.rollouts.prompts import PromptBuilder, prompt_crc
from trainer.sources.corpus import Corpus
from trainer.sources.sample_order import ROLLOUT, SHARE, batch_indices
from trainer.student.model import Student
from trainer.tokenization import SampleTokenizer

WaitingRollouts = dict[int, dict[int, list[Rollout]]]
"""Rollouts that no step has used, by step and by position of their sample in the batch of all processes."""


class OnPolicyBatches:
    """Iterable over this process's shard of every batch, in order. `close` ends an iteration that waits.

    steps    steps of this start of the run
    waiting  rollouts that were sampled before the run was resumed
    engine   the engine that samples; by default that of the run file
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        student: Student,
        tokenizer: SampleTokenizer,
        ranks: Ranks,
        steps: range,
        *,
        num_steps: int,
        waiting: WaitingRollouts,
        engine: RolloutEngine | None = None,
    ) -> None:
        assert config.rollout is not None
        self._config = config
        self._rollout = config.rollout
        self._corpus = corpus
        self._student = student
        self._ranks = ranks
        self._steps = steps
        self._num_steps = num_steps
        self._next = steps.start
        self._waiting = waiting
        self._builder = PromptBuilder(tokenizer, config.rollout, config.data.window_tokens)
        self._engine = engine or open_engine(config.rollout)
        self._queue: queue.SimpleQueue[list[Sample] | None] = queue.SimpleQueue()
        self.sample_s = 0.0  # seconds of the last call of `advance`

    def advance(self, done: int, should_stop: Callable[[], bool]) -> bool:
        """Sample and queue the batches that may begin after `done` steps. All processes must call this together.

        Returns false, and ends the iteration in all processes, soon after `should_stop` has returned true in one of
        them. A batch that is not complete in all processes is sampled again when the run is resumed.
        """
        began = time.monotonic()
        while self._next < min(done + self._rollout.max_staleness_steps + 1, self._num_steps):
            batch = self._batch(self._next, done, should_stop)
            if self._ranks.any(batch is None):
                self._waiting.pop(self._next, None)  # incomplete
                self.close()
                return False
            if batch is not None and self._next in self._steps:  # a later start of the run uses the others
                self._queue.put(batch)
            self._next += 1
        if self._next >= self._steps.stop:
            self._queue.put(None)
        self.sample_s = time.monotonic() - began
        return True

    def close(self) -> None:
        """End the iteration."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[list[Sample]]:
        while (batch := self._queue.get()) is not None:
            yield batch

    def state(self, done: int) -> dict[str, Any]:
        """Return the rollouts of this process that no step has used after `done` steps, as JSON values."""
        self._waiting = {step: batch for step, batch in self._waiting.items() if step >= done}
        return {
            str(step): {str(position): [asdict(each) for each in rollouts] for position, rollouts in batch.items()}
            for step, batch in self._waiting.items()
        }

    def _batch(self, step: int, version: int, should_stop: Callable[[], bool]) -> list[Sample] | None:
        """Return this process's shard of the batch of one step, with the rollouts of weights of `version` steps.

        Returns None if `should_stop` has returned true.
        """
        train, size = self._config.train, self._config.train.batch_samples
        indices = sorted(batch_indices(self._corpus.order, size, step, train.epochs))
        shard = self._ranks.shard(range(len(indices)))
        samples = {position: self._corpus.train[indices[position]] for position in shard}
        chosen = frozenset(self._waiting.get(step, ()))  # after a change of the share, what was sampled is still used
        prompts = {i: self._builder.with_prompt(sample) for i, sample in samples.items() if i in chosen}
        if self._ranks.any(not chosen or not self._fits(step, prompts)):
            chosen = replaced_positions(self._rollout, len(indices), train.seed, step, self._num_steps)
            prompts = {i: self._builder.with_prompt(sample) for i, sample in samples.items() if i in chosen}
            rollouts = self._sample(prompts, (step, version), should_stop) if chosen else {}
            if rollouts is None:
                return None
            self._waiting[step] = rollouts
        by_position = self._waiting[step]
        return [
            each
            for i, sample in samples.items()
            for each in (
                [sample]
                if i not in chosen
                else [self._builder.sample(prompts[i], one) for one in by_position[i]] or [prompts[i]]
            )
        ]

    def _fits(self, step: int, prompts: Mapping[int, Sample]) -> bool:
        """Return whether the waiting rollouts of a step continue these prompts and are recent enough.

        They may not, if the run file was changed before the run was resumed.
        """
        oldest = step - self._rollout.max_staleness_steps
        return all(
            bool(rollouts) == (prompts[i].refusal is None)
            and all(one.version >= oldest and one.prompt_crc == prompt_crc(prompts[i]) for one in rollouts)
            for i, rollouts in self._waiting[step].items()
            if i in prompts
        )

    def _sample(
        self, prompts: Mapping[int, Sample], step_and_version: tuple[int, int], should_stop: Callable[[], bool]
    ) -> dict[int, list[Rollout]] | None:
        """Sample rollouts of the prompts, by position. Refused prompts have no rollouts.

        Returns None if `should_stop` has returned true.
        """
        step, version = step_and_version
        usable = [i for i, prompt in prompts.items() if prompt.refusal is None]
        positions = [i for i in usable for _ in range(self._rollout.samples_per_prompt)]
        seed = (self._config.train.seed, ROLLOUT, step, self._ranks.rank)
        inputs = [self._builder.prompt(prompts[i]) for i in positions]
        sampled = self._engine.sample(self._student, inputs, seed, should_stop)
        if should_stop():
            return None
        rollouts: dict[int, list[Rollout]] = {i: [] for i in prompts}
        for i, tokens in zip(positions, sampled, strict=True):
            rollouts[i].append(self._builder.rollout(prompts[i], tokens, version))
        return rollouts


def open_engine(config: RolloutConfig) -> RolloutEngine:
    """Return the engine of a run file."""
    engine: RolloutEngine = resolve_name(ENGINES[config.engine])(config.generation_batch)
    return engine


def replaced_positions(config: RolloutConfig, size: int, seed: int, step: int, num_steps: int) -> frozenset[int]:
    """Return the positions of a batch of `size` samples that rollouts replace; the same in all processes.

    Their expected number is the scheduled share of the batch; it is rounded at random.
    """
    progress = min(step / max(num_steps - 1, 1), 1.0)
    begin, end = config.share, config.end_share
    share = float(scheduled([begin, 1 - begin], [end, 1 - end], config.schedule, progress)[0])
    random = np.random.default_rng([seed, SHARE, step])
    number = int(share * size + random.random())
    return frozenset(random.permutation(size)[:number].tolist())


def waiting_rollouts(states: Sequence[Mapping[str, Any]]) -> WaitingRollouts:
    """Return the rollouts of the states of all processes. Raises TypeError, KeyError or ValueError for other values."""
    waiting: WaitingRollouts = {}
    for state in states:
        for step, batch in state.items():
            for position, rollouts in batch.items():
                waiting.setdefault(int(step), {})[int(position)] = [_rollout(values) for values in rollouts]
    return waiting


def _rollout(values: Mapping[str, Any]) -> Rollout:
    columns = {name: tuple(values[name]) for name in ("ids", "num_bytes", "logprobs", "entropies")}
    return Rollout(**{**values, **columns})
