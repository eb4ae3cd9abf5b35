"""Fair shares of a capacity: one client cannot keep the others out."""

import time
from collections import Counter
from collections.abc import Callable

WAITING_S = 60.0  # a client counts as waiting for this long after a refusal, longer than any Retry-After


class FairShares:
    """A capacity, in tokens for example, that clients share.

    A client may take all of it while no other client waits. While others wait, it may take more only within an equal
    share, so what it releases is left to them. A client that has nothing may always take what fits.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._clock = capacity, clock
        self._taken: Counter[str] = Counter()
        self._refused_at: dict[str, float] = {}  # oldest first

    @property
    def taken(self) -> int:
        """What all clients have taken together."""
        return self._taken.total()

    def taken_by(self, client: str) -> int:
        """What one client has taken."""
        return self._taken[client]

    def excess(self, client: str, amount: int) -> int:
        """Return how much must be released until the client may take `amount`; 0 if it may now.

        A client that may not counts as waiting from now on.
        """
        excess = max(self.taken + amount - self._capacity, self._excess_of_share(client, amount), 0)
        if excess:
            self._refused_at.pop(client, None)
            self._refused_at[client] = self._clock()
        return excess

    def take(self, client: str, amount: int) -> None:
        """Add to what a client has taken."""
        self._taken[client] += amount

    def release(self, client: str, amount: int) -> None:
        """Subtract from what a client has taken."""
        self._taken[client] -= amount
        if not self._taken[client]:
            del self._taken[client]

    def _excess_of_share(self, client: str, amount: int) -> int:
        while self._refused_at:
            oldest = next(iter(self._refused_at))
            if self._clock() - self._refused_at[oldest] <= WAITING_S:
                break
            del self._refused_at[oldest]
        if not self._taken[client] or not self._refused_at.keys() - {client}:
            return 0
        clients = self._taken.keys() | self._refused_at.keys()
        return self._taken[client] + amount - self._capacity // len(clients)
