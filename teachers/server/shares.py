"""Fair division of a capacity between clients, so that one client cannot exclude the others."""

import time
from collections import Counter
from collections.abc import Callable

WAITING_S = 60.0  # a client counts as waiting for this long after a refusal, longer than any Retry-After


class FairShares:
    """Capacity that clients share, for example tokens of a queue.

    While no other client waits, a client may take the whole capacity. While others wait, it may take more only up to an
    equal share. A client that has taken nothing may take any amount that is free.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._clock = capacity, clock
        self._taken: Counter[str] = Counter()
        self._refused_at: dict[str, float] = {}  # oldest first

    @property
    def taken(self) -> int:
        """Amount that all clients have taken."""
        return self._taken.total()

    def taken_by(self, client: str) -> int:
        """Amount that one client has taken."""
        return self._taken[client]

    def excess(self, client: str, amount: int) -> int:
        """Return the amount that must be released before the client may take `amount`, or 0 if it may take it now.

        If the result is not 0, the client counts as waiting.
        """
        excess = max(self.taken + amount - self._capacity, self._excess_of_share(client, amount), 0)
        if excess:
            self._refused_at.pop(client, None)
            self._refused_at[client] = self._clock()
        return excess

    def take(self, client: str, amount: int) -> None:
        """Count an amount of the capacity as taken by a client."""
        self._taken[client] += amount

    def release(self, client: str, amount: int) -> None:
        """Subtract a released amount from the capacity that a client has taken."""
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
