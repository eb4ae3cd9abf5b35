"""Engine: the one question every backend answers. Token ids in, rows out, one sequence at a time.

An engine batches as it likes; whoever waits for an answer may go away (asyncio cancellation), and an engine
drops what nobody waits for.
"""

from pathlib import Path
from typing import Protocol

from teachers.protocol import Card
from teachers.rows import Rows


class Engine(Protocol):
    """A model that scores."""

    @property
    def card(self) -> Card:
        """What this teacher is and how much it takes."""
        ...

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer's files by allow-listed name."""
        ...

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        """Rows for positions start … len − 1 of one sequence within the card's limits."""
        ...

    async def check(self) -> None:
        """Answer a one-token question; raises whatever keeps the engine from answering."""
        ...

    def close(self) -> None:
        """Stop working; what is still waiting is dropped."""
        ...
