"""Teachers that run once for many runs: real models behind the real server, whose answers are remembered in memory.

Nothing is written. A text that several runs train on is scored once, at the most candidates that any of them asks for.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import uvloop

from teachers.engine import Engine, EngineOptions
from teachers.protocol import Card
from teachers.rows import Rows
from teachers.serving.process import TeacherServer, listen_on, serve
from teachers.serving.service import Service

MOST_TOP_K = 64


class Remembering:
    """An engine that scores every sequence once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[bytes, Rows] = {}

    @property
    def card(self) -> Card:
        return self._engine.card.model_copy(update={"max_top_k": MOST_TOP_K, "max_chosen": 0})

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        return self._engine.tokenizer_files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        key = np.array([start, *sequence], dtype=np.int64).tobytes()
        if key not in self._known:
            self._known[key] = await self._engine.score(sequence, start, MOST_TOP_K)
        return likeliest(self._known[key], top_k)

    async def check(self) -> None:
        await self._engine.check()

    def close(self) -> None:
        self._engine.close()


def likeliest(rows: Rows, top_k: int) -> Rows:
    """The first `top_k` candidates of every row; the others join the tail."""
    left_out = np.exp(rows.logprobs[:, top_k:].astype(np.float64)).sum(axis=1)
    tail = (rows.tail + left_out).astype(np.float32)
    return replace(rows, ids=rows.ids[:, :top_k], logprobs=rows.logprobs[:, :top_k], tail=tail)


def run_teacher(folder: Path, device: str, port: int) -> None:
    """As `tutelage teach` serves."""
    from teachers.engines.transformers import TransformersEngine

    service = Service(Remembering(TransformersEngine(folder, EngineOptions(device=device))))
    uvloop.run(serve(service, listen_on("127.0.0.1", port), TeacherServer(service)))
