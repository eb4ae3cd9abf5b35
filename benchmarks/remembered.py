"""Teachers for many runs: models behind the server, with scores cached in memory.

Nothing is written to disk. A text that several runs train on is scored once, at the largest K of all runs.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import uvloop

from teachers.engines.base import Engine
from teachers.engines.transformers_options import TransformersOptions
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows
from teachers.server.process import TeacherServer, listen_on, serve
from teachers.server.service import Service

MAX_TOP_K = 64


class CachingEngine:
    """An engine that scores every sequence once and caches the rows."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache: dict[bytes, Rows] = {}

    @property
    def card(self) -> TeacherCard:
        return self._engine.card.model_copy(update={"max_top_k": MAX_TOP_K, "max_chosen": 0})

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._engine.tokenizer_files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        key = np.array([start, *sequence], dtype=np.int64).tobytes()
        if key not in self._cache:
            self._cache[key] = await self._engine.score(sequence, start, MAX_TOP_K)
        return top_candidates(self._cache[key], top_k)

    async def check(self) -> None:
        await self._engine.check()

    def close(self) -> None:
        self._engine.close()


def top_candidates(rows: Rows, top_k: int) -> Rows:
    """Return the first `top_k` candidates of every row; the mass of the others is added to the tail."""
    removed_mass = np.exp(rows.logprobs[:, top_k:].astype(np.float64)).sum(axis=1)
    tail = (rows.tail + removed_mass).astype(np.float32)
    return replace(rows, ids=rows.ids[:, :top_k], logprobs=rows.logprobs[:, :top_k], tail=tail)


def run_teacher(folder: Path, device: str, port: int) -> None:
    """Serve like `tutelage serve`."""
    from teachers.engines.transformers import TransformersEngine

    service = Service(CachingEngine(TransformersEngine(folder, TransformersOptions(device=device))))
    uvloop.run(serve(service, listen_on("127.0.0.1", port), TeacherServer(service)))
