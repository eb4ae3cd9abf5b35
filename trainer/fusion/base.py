"""The interface of fusion methods, and the settings of the fusion of a batch.

A method weights the teachers in two steps. First, `teacher_weights` may change the scheduled weights of one sample, by
a column of the data or by running statistics. Then `scores` compares the targets of the teachers. The weight of a
teacher at a position is proportional to teacher weight · exp(score).

Shapes: N teachers, T positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.fusion import FUSION_METHODS
from trainer.fusion.config import FusionConfig
from trainer.fusion.inputs import Bools, Floats, StackedSample
from trainer.records import Sample
from trainer.sources.corpus import Samples

SCOPES = ("token", "sample", "batch")

T = TypeVar("T")
AllGather = Callable[[Any], list[Any]]
"""Collect one value from every process that fuses a shard of the same batch, in the order of the shards."""


def single_process(value: T) -> list[T]:
    """AllGather of a single process."""
    return [value]


@dataclass(frozen=True)
class FusionRule:
    """Settings of the fusion of a batch.

    method       a key of FUSION_METHODS; the classes describe the methods
    scope        unit over which min_ce, avg_ce and confidence compare the teachers: one token, one sample, or all
                 samples of the batch in which the same teachers take part. Other methods ignore it
    temperature  temperature of the softmax of avg_ce and confidence. Other methods ignore it
    top_k        entries kept in a row, ties in favor of the lowest id; the rest joins the tail. None keeps all entries.
                 The label of a sample with `keeps_label` is one of them wherever it is listed

    Raises ValueError that names the value and the choices.
    """

    method: str = "mean"
    scope: str = "sample"
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (("method", self.method, FUSION_METHODS), ("scope", self.scope, SCOPES)):
            if value not in choices:
                raise ValueError(f"fusion {name}: expected one of {', '.join(choices)}, received {value!r}")
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"fusion temperature: expected a finite number above 0, received {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"fusion top_k: expected 1 or more, or None to keep all entries, received {self.top_k}")


class FusionMethod:
    """Base class of fusion methods, with the behavior of `mean`. A run has one instance.

    names          names of the fused teachers, in order
    config         section [fusion] of the run file

    mean           the mean over teachers: arithmetic (of probabilities) or geometric (of their logarithms, normalized)
    uses_scope     whether `scores` depends on FusionRule.scope
    observes_text  whether `observe` must be called for every sample after it was fused
    """

    mean: ClassVar[Literal["arithmetic", "geometric"]] = "arithmetic"
    uses_scope: ClassVar[bool] = False
    observes_text: ClassVar[bool] = False

    def __init__(self, names: Sequence[str], config: FusionConfig) -> None:
        self.names = tuple(names)

    @classmethod
    def scores(cls, samples: Sequence[StackedSample], rule: FusionRule, all_gather: AllGather) -> list[Floats]:
        """Return the log weights of each sample: [N, T], or [N, 1] if they are the same for all positions.

        With scope batch, `samples` are this process's shard of the batch, which may be empty; otherwise one sample.
        """
        return [np.zeros((rows.valid.shape[0], 1)) for _, rows in samples]

    def check_samples(self, samples: Samples) -> None:
        """Raise DataError if the method cannot determine the weights of the teachers for one of the samples."""

    def teacher_weights(self, sample: Sample, scheduled_N: Floats, available_N: Bools) -> Floats:
        """Return the teacher weights [N] of one sample, ≥ 0 and not all 0.

        scheduled_N  weights of this step according to the schedule
        available_N  whether a teacher scored any position of the sample
        """
        return scheduled_N

    def observe(self, domain: str, nats_N: Floats, bytes_N: NDArray[np.int64]) -> None:
        """Add one text to the running statistics of its domain.

        nats_N, bytes_N  negative log-likelihood of the text under each teacher, and bytes scored, from `text_nats`
        """

    def state(self) -> dict[str, Any] | None:
        """Return the running state as JSON values, or None if the method has none."""
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a running state. Raises CheckpointError if it does not belong to the same teachers."""


def fusion_method(name: str) -> type[FusionMethod]:
    """Return the class of a registered method."""
    method: type[FusionMethod] = resolve_name(FUSION_METHODS[name])
    return method
