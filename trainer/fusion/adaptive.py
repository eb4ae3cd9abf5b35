"""Fusion method `adaptive`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import CheckpointError
from trainer.fusion.base import FusionMethod
from trainer.fusion.config import FusionConfig
from trainer.fusion.inputs import Bools, Floats
from trainer.fusion.running_bits_per_byte import RunningBitsPerByte
from trainer.records import Sample


class Adaptive(FusionMethod):
    """Arithmetic mean weighted by running bits per byte of each teacher in the domain of the sample."""

    observes_text = True

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        super().__init__(names, config)
        self._running = RunningBitsPerByte(self.names, config.half_life_bytes, config.margin_bpb, config.temperature)

    def teacher_weights(self, sample: Sample, scheduled_N: Floats, available_N: Bools) -> Floats:
        """Return the products of scheduled weights and running weights.

        If the product is 0 for every available teacher, the scheduled weights are returned.
        """
        weights_N: Floats = scheduled_N * self._running.weights(sample.domain)
        return weights_N if weights_N[available_N].any() else scheduled_N

    def observe(self, domain: str, nats_N: Floats, bytes_N: NDArray[np.int64]) -> None:
        self._running = self._running.updated(domain, nats_N, bytes_N)

    def state(self) -> dict[str, Any]:
        return self._running.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the running averages of each teacher, by its name. Settings such as half_life_bytes are not restored.

        Raises CheckpointError if the state belongs to other teachers or to another method.
        """
        try:
            saved = RunningBitsPerByte.from_state(state)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint has no valid state of fusion.method adaptive ({str(error)[:500]}): restore an earlier "
                "checkpoint"
            ) from error
        if sorted(saved.names) != sorted(self.names):
            raise CheckpointError(
                f"fusion.method adaptive: the checkpoint has statistics of the teachers {', '.join(saved.names)}, this "
                f"run has {', '.join(self.names)}; resume with the same teachers"
            )
        order = [saved.names.index(name) for name in self.names]
        averages = {domain: tuple(values[i] for i in order) for domain, values in saved.averages.items()}
        self._running = replace(self._running, averages=averages)
