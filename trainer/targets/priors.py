"""Weights that the teachers of a sample start with: from a column of the data, from the step, from what was seen.

Pure functions and one frozen value. What they return is relative, ≥ 0 and never all 0, and becomes `prior_N` of
fusion.Aligned, alone or times one another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPES = ("constant", "linear", "cosine")

Floats = NDArray[np.float64]


def routed(names: Sequence[str], chosen: str) -> Floats:
    """[N] one-hot on the teacher that a sample names. Raises ValueError with the choices for an unknown name."""
    if list(names).count(chosen) != 1:
        raise ValueError(f"router: expected one of {', '.join(names)}, received {chosen!r}")
    return np.array([float(name == chosen) for name in names])


def scheduled(start_N: Sequence[float], end_N: Sequence[float], shape: str, progress: float) -> Floats:
    """[N] weights at a progress of 0 to 1 through the run: `start_N` throughout, or on a way to `end_N`.

    linear moves evenly, cosine slowly at both ends. Weights are relative, so both ends are scaled to sum 1 and every
    result does. Raises ValueError for weights that cannot be, an unknown shape, and a progress outside 0 … 1.
    """
    if shape not in SHAPES:
        raise ValueError(f"schedule of weights: expected one of {', '.join(SHAPES)}, received {shape!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"schedule of weights: expected a progress from 0 to 1, received {progress}")
    if len(start_N) != len(end_N):
        raise ValueError(
            f"schedule of weights: expected {len(start_N)} at the end, as at the start, received {len(end_N)}"
        )
    start, end = _scaled("start", start_N), _scaled("end", end_N)
    share = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[shape]
    weights: Floats = (1 - share) * start + share * end
    return weights


def _scaled(name: str, weights_N: Sequence[float]) -> Floats:
    weights: Floats = np.array(weights_N, dtype=np.float64)
    if not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError(f"schedule of weights, {name}: expected numbers ≥ 0 that are not all 0, received {weights_N}")
    weights /= weights.sum()
    return weights


@dataclass(frozen=True)
class RunningBpb:
    """Bits per byte of each teacher in each domain of the data, as an exponential average over the text seen there.

    Text counts half as much once `half_life_bytes` more of the same domain have been seen from the same teacher; the
    average is exact (no pull to a start value), and text given in two parts of equal bits per byte counts as in one.
    Only knowledge that is effective in a domain is fused: a teacher there more than `margin` bits per byte behind the
    best has no weight, the others have the softmax of −bits per byte / `temperature`.

    names  the teachers, in order
    seen   domain → for each teacher its bits per byte and how full its average is (0: nothing seen, to 1)

    Raises ValueError for settings that cannot be.
    """

    names: tuple[str, ...]
    half_life_bytes: float
    margin: float
    temperature: float = 1.0
    seen: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"running bits per byte: expected distinct names of teachers, received {self.names}")
        for name, value in {"half_life_bytes": self.half_life_bytes, "temperature": self.temperature}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"running bits per byte, {name}: expected a finite number above 0, received {value}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"running bits per byte, margin: expected a finite number ≥ 0, received {self.margin}")
        for domain, averages in self.seen.items():
            if len(averages) != len(self.names) or not all(b >= 0 and 0 <= full <= 1 for b, full in averages):
                raise ValueError(
                    f"running bits per byte, domain {domain!r}: expected bits per byte ≥ 0 and a fullness of 0 to 1 "
                    f"for each of {len(self.names)} teachers, received {averages}"
                )

    def weights(self, domain: str) -> Floats:
        """[N] weights that sum to 1; even before anything was seen in the domain.

        A teacher that has not been seen there while others have counts as the best of them until it has.
        """
        averages = self.seen.get(domain, ())
        known = [bpb for bpb, full in averages if full > 0]
        if not known:
            return np.full(len(self.names), 1 / len(self.names))
        behind = np.array([bpb - min(known) if full > 0 else 0.0 for bpb, full in averages])
        weights: Floats = np.where(behind <= self.margin, np.exp(-behind / self.temperature), 0.0)
        weights /= weights.sum()
        return weights

    def updated(
        self, domain: str, nats_N: Sequence[float] | Floats, bytes_N: Sequence[int] | NDArray[np.int64]
    ) -> "RunningBpb":
        """With a text of the domain: its negative log-likelihood in nats and its bytes, for each teacher.

        A teacher with 0 bytes stays as it was. Raises ValueError for other than N finite numbers ≥ 0.
        """
        for what, given in {"nats": nats_N, "bytes": bytes_N}.items():
            if len(given) != len(self.names) or not all(0 <= value < math.inf for value in given):
                raise ValueError(
                    f"running bits per byte, domain {domain!r}: expected {what} ≥ 0 for each of "
                    f"{', '.join(self.names)}, received {list(given)}"
                )
        before = self.seen.get(domain, ((0.0, 0.0),) * len(self.names))
        after = tuple(
            self._averaged(average, float(nats), float(num_bytes))
            for average, nats, num_bytes in zip(before, nats_N, bytes_N, strict=True)
        )
        return replace(self, seen={**self.seen, domain: after})

    def _averaged(self, average: tuple[float, float], nats: float, num_bytes: float) -> tuple[float, float]:
        if num_bytes == 0:
            return average
        bpb, full = average
        kept = full * 2 ** (-num_bytes / self.half_life_bytes)
        fresh = -math.expm1(-math.log(2) * num_bytes / self.half_life_bytes)
        return (kept * bpb + fresh * nats / math.log(2) / num_bytes) / (kept + fresh), kept + fresh

    def state(self) -> dict[str, Any]:
        """All of it as JSON has it, for a checkpoint."""
        return {
            "names": list(self.names),
            "half_life_bytes": self.half_life_bytes,
            "margin": self.margin,
            "temperature": self.temperature,
            "seen": {domain: [list(average) for average in averages] for domain, averages in self.seen.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RunningBpb":
        """The value that `state` was taken of. Raises ValueError as a new one does."""
        seen = {domain: tuple((bpb, full) for bpb, full in averages) for domain, averages in state["seen"].items()}
        return cls(**{**state, "names": tuple(state["names"]), "seen": seen})
