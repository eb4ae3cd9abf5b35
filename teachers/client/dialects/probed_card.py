"""The card of a server that has none. The client builds it from requests, and recognizes the model by its scores.

Weights cannot be hashed through such a server. The card contains the log-probabilities of one text instead, which are
compared when a replica is connected or was unavailable.
"""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from teachers.protocol.errors import FingerprintMismatch
from teachers.protocol.messages import PROBE, TeacherCard

PROBE_TEXT = PROBE + "\n\tdef f(x): return x ** 2  # 1,234.5 € – naïve 東京 🙂\n"
# Mean |Δ| in nats per token of PROBE_TEXT, measured with SmolLM2-135M in bfloat16. One vLLM, alone and with 40 other
# texts: 0.000. vLLM and transformers: 0.042. All weights changed by 0.1, 0.3, 1 and 3 %: 0.016, 0.047, 0.16, 0.48.
PROBE_TOLERANCE = 0.1


class ProbedCard(TeacherCard):
    """The card of a server without one. Replicas are compared by the client's `check`, not by equality of cards."""

    root: str | None
    """Source of the server's model."""
    probe_ids: tuple[int, ...]
    """PROBE_TEXT in tokens of the server's tokenizer, without special tokens."""
    probe_logprobs: tuple[float, ...] = ()
    """Log-probabilities (nats) of probe_ids after BOS if the model expects it; else without the first id."""


def check_probe(expected: Sequence[float], received: Sequence[float]) -> None:
    """Compare log-probabilities of PROBE_TEXT. Raises FingerprintMismatch if they differ by over PROBE_TOLERANCE."""
    gap = float(np.abs(np.subtract(expected, received)).mean())
    if not gap <= PROBE_TOLERANCE:
        bits = [-float(np.sum(nats)) / float(np.log(2)) for nats in (expected, received)]
        raise FingerprintMismatch(
            f"expected {bits[0]:.1f} bits for the probe text, received {bits[1]:.1f}, a mean difference of {gap:.3f} "
            f"nats per token, over {PROBE_TOLERANCE}: the teacher was restarted with other weights"
        )


async def largest_accepted(maximum: int, accepts: Callable[[int], Awaitable[bool]]) -> int:
    """Return the largest number from 1 to `maximum` that is accepted, 0 if none is. Binary search."""
    if await accepts(maximum):
        return maximum
    low, high = 0, maximum  # invariant: low is accepted (or 0), high is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await accepts(middle) else (low, middle)
    return low
