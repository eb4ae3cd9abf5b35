"""The card of a stock server, which has none. The client builds the card, and recognizes the model by its scores.

Weights cannot be hashed through such a server. The card contains the log-probabilities of one text instead. They are
compared whenever a replica is connected, and after it was unavailable.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from teachers.protocol.errors import FingerprintMismatch
from teachers.protocol.messages import PROBE, TeacherCard
from teachers.protocol.untrusted_text import clean

PROBE_TEXT = PROBE + "\n\tdef f(x): return x ** 2  # 1,234.5 € – naïve 東京 🙂\n"
# Mean |Δ| in nats per token of PROBE_TEXT, measured with SmolLM2-135M in bfloat16. One vLLM, alone and with 40 other
# texts: 0.000. vLLM and transformers: 0.042. All weights changed by 0.1, 0.3, 1 and 3 %: 0.016, 0.047, 0.16, 0.48.
PROBE_TOLERANCE = 0.1

Property = str | int | bool | None
Properties = Mapping[str, Property]


@dataclass(frozen=True)
class ServerKind:
    """A kind of stock server.

    name             name with an article, for messages
    cost             size and limits of its responses compared with the native protocol, for the user
    masks_positions  whether positions of a response may be masked, because the server returns no ids
    """

    name: str
    cost: str
    masks_positions: bool = False


class ProbedCard(TeacherCard):
    """The card of a stock server. Replicas are compared by `check` of their client, not by equality of cards."""

    model_config = ConfigDict(extra="forbid")  # it is built by the client, not parsed from a response

    kind: ServerKind
    """Kind of the server."""
    properties: dict[str, Property]
    """Properties of the served model that the server states or that requests show, by name."""
    root: str | None = None
    """Directory or name from which the server loaded the model; None if the server does not state it."""
    probe_ids: tuple[int, ...]
    """PROBE_TEXT in tokens of the server's tokenizer, without special tokens."""
    probe_logprobs: tuple[float, ...] = ()
    """Log-probabilities (nats) of probe_ids after BOS if the model expects it; else without the first id."""

    @property
    def masks_positions(self) -> bool:
        return self.kind.masks_positions

    @property
    def protocol_cost(self) -> str:
        return f"{self.kind.name}: {self.kind.cost}"

    def check_properties(self, received: Properties) -> None:
        """Raise FingerprintMismatch, which names the first property that differs, unless all are equal."""
        for name, expected in self.properties.items():
            if received[name] != expected:
                raise FingerprintMismatch(
                    f"expected {name} {clean(expected, 80)}, received {clean(received[name], 80)}: the server has "
                    "another model or other settings than before, or than another replica of this teacher"
                )

    def check_scores(self, received: Sequence[float]) -> None:
        """Compare received log-probabilities of PROBE_TEXT with probe_logprobs. Masked positions (NaN) are skipped.

        Raises FingerprintMismatch if they differ by over PROBE_TOLERANCE on average, or if every position is masked.
        """
        pairs = np.array([self.probe_logprobs, received])
        pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
        if not pairs.size:
            raise FingerprintMismatch("expected the scores of the probe text, and every position is masked")
        gap = float(np.abs(pairs[0] - pairs[1]).mean())
        if gap > PROBE_TOLERANCE:
            bits = -pairs.sum(axis=1) / np.log(2)
            raise FingerprintMismatch(
                f"expected {bits[0]:.1f} bits for the probe text, received {bits[1]:.1f}, a mean difference of "
                f"{gap:.3f} nats per token, over {PROBE_TOLERANCE}: the teacher was restarted with other weights"
            )


def fingerprint(properties: Properties, tokenizer_sha256: str) -> str:
    """Return a hash of all that is known about a model without its weights."""
    return hashlib.sha256(json.dumps([*properties.values(), tokenizer_sha256]).encode()).hexdigest()


async def largest_accepted(maximum: int, accepts: Callable[[int], Awaitable[bool]]) -> int:
    """Return the largest number from 1 to `maximum` that is accepted, 0 if none is. Binary search."""
    if await accepts(maximum):
        return maximum
    low, high = 0, maximum  # invariant: low is accepted (or 0), high is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await accepts(middle) else (low, middle)
    return low
