"""The batches of a run without rollouts: each process's shard of the samples of every step."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from trainer.distributed import Ranks
from trainer.records import Sample
from trainer.sources.corpus import Corpus
from trainer.sources.sample_order import batch_indices
from trainer.training.config import TrainConfig


class Batches(Protocol):
    """Iterable over this process's shard of every batch, for the thread of the stream.

    All other methods are for the training loop. All processes call them together.

    sample_s  seconds that the last call of `advance` took
    """

    sample_s: float

    def __iter__(self) -> Iterator[list[Sample]]: ...

    def advance(self, done: int, should_stop: Callable[[], bool]) -> bool:
        """Prepare the batches that may begin after `done` steps.

        Returns false, and ends the iteration in all processes, soon after `should_stop` has returned true in one of
        them.
        """
        ...

    def state(self, done: int) -> dict[str, Any]:
        """Return the prepared data of this process that no step has used after `done` steps, as JSON values."""
        ...

    def close(self) -> None:
        """End an iteration that waits."""
        ...


class CorpusBatches:
    """Batches of given text. They do not depend on the student. A `Batches`.

    steps  steps of this start of the run
    """

    sample_s = 0.0

    def __init__(self, corpus: Corpus, config: TrainConfig, ranks: Ranks, steps: range) -> None:
        self._corpus = corpus
        self._config = config
        self._ranks = ranks
        self._steps = steps

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield this process's shard of every batch.

        Indices are sorted before they are sharded, so that in later epochs most samples are on the process that has
        cached their scores.
        """
        for step in self._steps:
            indices = sorted(batch_indices(self._corpus.order, self._config.batch_samples, step, self._config.epochs))
            yield [self._corpus.train[i] for i in self._ranks.shard(indices)]

    def advance(self, done: int, should_stop: Callable[[], bool]) -> bool:
        """Return true: there is nothing to prepare."""
        return True

    def state(self, done: int) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""
