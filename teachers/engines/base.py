"""The interface of an engine: token ids in, rows out, one sequence per call.

An engine batches concurrent calls as it likes. A caller may cancel a call (asyncio cancellation); the engine then drops
the work.
"""

from typing import Protocol, runtime_checkable

from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows


class Engine(Protocol):
    """A model that scores sequences."""

    @property
    def card(self) -> TeacherCard:
        """The properties and limits of the model."""
        ...

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """Contents of the tokenizer's files by name, as listed in messages.TOKENIZER_FILES."""
        ...

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        """Return the rows of positions start … len − 1 of one sequence within the card's limits."""
        ...

    async def check(self) -> None:
        """Score one token. Raises any error that keeps the engine from working."""
        ...

    def close(self) -> None:
        """Stop the engine. Waiting calls are cancelled."""
        ...


@runtime_checkable
class ChosenIdsEngine(Engine, Protocol):
    """An engine that also scores chosen ids; the max_chosen of its card is above 0."""

    async def score_chosen(self, sequence: list[int], start: int, top_k: int, chosen: list[list[int]]) -> Rows:
        """Return the rows like `score`, with the log-probabilities of the chosen ids of every position."""
        ...
