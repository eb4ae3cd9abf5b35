"""Running bits per byte of teachers in domains of the data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.fusion.inputs import Floats


class _State(BaseModel):
    """Schema of `RunningBitsPerByte.state()`, for the validation of a state that is read from a checkpoint."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    names: tuple[str, ...]
    half_life_bytes: float
    margin: float
    temperature: float
    averages: dict[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True)
class RunningBitsPerByte:
    """Exponential moving average of the bits per byte of each teacher in each domain of the data.

    The weight of a text halves with every `half_life_bytes` of later text of the same domain and teacher. The average
    is normalized by the sum of its weights, so it has no bias towards an initial value. Splitting a text into parts
    with equal bits per byte does not change it.

    A teacher that is more than `margin` bits per byte behind the best teacher of the domain has weight 0. The others
    are weighted by the softmax of −bits per byte / `temperature`.

    names     the teachers, in order
    averages  domain → for each teacher its bits per byte and the sum of the weights (0: no text yet; approaches 1)

    Raises ValueError for invalid settings.
    """

    names: tuple[str, ...]
    half_life_bytes: float
    margin: float
    temperature: float = 1.0
    averages: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"running bits per byte: expected distinct names of teachers, received {self.names}")
        for name, value in {"half_life_bytes": self.half_life_bytes, "temperature": self.temperature}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"running bits per byte, {name}: expected a finite number above 0, received {value}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"running bits per byte, margin: expected a finite number ≥ 0, received {self.margin}")
        for domain, values in self.averages.items():
            if len(values) != len(self.names) or not all(
                0 <= bpb < math.inf and 0 <= total <= 1 for bpb, total in values
            ):
                raise ValueError(
                    f"running bits per byte, domain {domain!r}: expected bits per byte ≥ 0 and a sum of weights from 0 "
                    f"to 1 for each of {len(self.names)} teachers, received {values}"
                )

    def weights(self, domain: str) -> Floats:
        """Return weights [N] that sum to 1; equal weights if no text of the domain has been observed.

        A teacher without any text of the domain counts as equal to the best of the others.
        """
        values = self.averages.get(domain, ())
        known = [bpb for bpb, total in values if total > 0]
        if not known:
            return np.full(len(self.names), 1 / len(self.names))
        behind = np.array([bpb - min(known) if total > 0 else 0.0 for bpb, total in values])
        weights: Floats = np.where(behind <= self.margin, np.exp(-behind / self.temperature), 0.0)
        weights /= weights.sum()
        return weights

    def updated(
        self, domain: str, nats_N: Sequence[float] | Floats, bytes_N: Sequence[int] | NDArray[np.int64]
    ) -> "RunningBitsPerByte":
        """Return a copy whose averages include one more text of the domain.

        nats_N   negative log-likelihood of the text under each teacher, in nats
        bytes_N  number of bytes of the text that each teacher scored; with 0 bytes, its average does not change
        Raises ValueError unless both have N finite numbers ≥ 0.
        """
        for unit, given in {"nats": nats_N, "bytes": bytes_N}.items():
            if len(given) != len(self.names) or not all(0 <= value < math.inf for value in given):
                raise ValueError(
                    f"running bits per byte, domain {domain!r}: expected {unit} ≥ 0 for each of "
                    f"{', '.join(self.names)}, received {list(given)}"
                )
        before = self.averages.get(domain, ((0.0, 0.0),) * len(self.names))
        after = tuple(
            self._updated_average(average, float(nats), float(num_bytes))
            for average, nats, num_bytes in zip(before, nats_N, bytes_N, strict=True)
        )
        return replace(self, averages={**self.averages, domain: after})

    def _updated_average(self, average: tuple[float, float], nats: float, num_bytes: float) -> tuple[float, float]:
        if num_bytes == 0:
            return average
        bpb, total = average
        # decay = 2^(−bytes / half-life); the old text keeps total · decay, the new text has 1 − decay
        kept = total * 2 ** (-num_bytes / self.half_life_bytes)
        added = -math.expm1(-math.log(2) * num_bytes / self.half_life_bytes)
        return (kept * bpb + added * nats / math.log(2) / num_bytes) / (kept + added), kept + added

    def state(self) -> dict[str, Any]:
        """Return all fields as a dictionary that can be written as JSON, for a checkpoint."""
        return {
            "names": list(self.names),
            "half_life_bytes": self.half_life_bytes,
            "margin": self.margin,
            "temperature": self.temperature,
            "averages": {domain: [list(value) for value in values] for domain, values in self.averages.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RunningBitsPerByte":
        """Build from the result of `state()`. Raises ValueError for another schema and for invalid values."""
        try:
            return cls(**_State.model_validate(state).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg'].lower()}") from error
