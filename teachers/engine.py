"""Engine: the one question every backend answers. Token ids in, rows out, one sequence at a time.

An engine batches as it likes; whoever waits for an answer may go away (asyncio cancellation), and an engine
drops what nobody waits for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from teachers.protocol import Card
from teachers.rows import Rows

EngineKind = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model.

    dtype            weights and activations
    device           "cpu", "cuda", "cuda:1", …; transformers only
    bos              whether BOS goes in front of every text; "auto" is the tokenizer's word, or, where it has none,
                     what the model predicts better
    max_tokens       longest sequence; None takes the model's own limit
    max_top_k        largest K
    batch_tokens     padded tokens in one forward pass; 0 scores each sequence alone, reproducibly; transformers only
    tensor_parallel  GPUs that share the model; vllm only
    vllm_args        further engine arguments by vLLM's own names; vllm only
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    bos: Literal["auto", "yes", "no"] = "auto"
    max_tokens: int | None = None
    max_top_k: int = 128
    batch_tokens: int = 0
    tensor_parallel: int = 1
    vllm_args: Mapping[str, Any] = field(default_factory=dict)


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


@runtime_checkable
class ChoosingEngine(Engine, Protocol):
    """An engine that scores chosen ids too: its card's max_chosen is above 0."""

    async def score_chosen(self, sequence: list[int], start: int, top_k: int, chosen: list[list[int]]) -> Rows:
        """`score`, with the log-probabilities of the ids that are chosen for each of the positions."""
        ...
