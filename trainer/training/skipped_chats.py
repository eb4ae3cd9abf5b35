"""Skipped chats of a run: the first ones are named, and a run that finds no usable chat ends with an error."""

import logging
from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.sources.sample_order import SampleOrder
from trainer.telemetry.collector import Collector

log = logging.getLogger("tutelage.data")

MAX_NAMED = 3  # skipped chats that are named, per start of the run


class SkippedChats:
    """Count the steps without an update, and end the run if no chat of a whole epoch can be used.

    A step makes no update if all of its chats are skipped. Every process of a run calls the methods with the same
    values, so that all processes raise the same error.

    done  number of steps that were completed before this start of the run
    """

    def __init__(self, config: RunConfig, order: SampleOrder, done: int) -> None:
        self._batch_samples = config.train.batch_samples
        self._epoch_samples, self._all_samples = order.epoch_samples, config.train.epochs * order.epoch_samples
        self._last_update = done  # number of steps up to the last one that updated the student
        self._num_named = 0
        self._reason = ""

    def check_step(self, done: int, num_tokens: int, collectors: Sequence[Collector]) -> None:
        """Record one step, and log its skipped chats. Raises DataError if no chat of a whole epoch could be used.

        done        number of completed steps of the run, including this one
        num_tokens  number of supervised tokens in the batch; 0 if the step made no update
        collectors  telemetry of the batch, one collector per rank
        """
        for collector in collectors:
            self._reason = collector.skip_reason or self._reason
            if collector.skipped and self._num_named < MAX_NAMED:
                self._num_named += 1
                log.warning("a chat is skipped: %s", collector.skip_reason)
        if num_tokens:
            self._last_update = done
        begin = self._last_update * self._batch_samples
        end = min(done * self._batch_samples, self._all_samples)
        first_epoch = -(-begin // self._epoch_samples)  # the first one that begins after the last update
        if (first_epoch + 1) * self._epoch_samples <= end:
            raise DataError(f"no chat of a whole epoch could be used; the last one was skipped: {self._reason}")

    def check_end(self, num_updates: int) -> None:
        """Raise DataError at the end of a run that has not updated the student in any of its starts."""
        if num_updates == 0:
            raise DataError(f"no chat of the run could be used; the last one was skipped: {self._reason}")
