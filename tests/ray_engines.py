"""An engine for replicas on Ray: it answers from a formula once told to, and notes what happens to it in a folder."""

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from teachers.engine import Engine, EngineKind, EngineOptions
from teachers.rows import Rows
from teachers.serving.ray_serve import Opening
from tests.serve import FormulaEngine


class WatchedEngine(FormulaEngine):
    """No answer until the folder has a file 'go'; its check fails while a file there is named after its process."""

    def __init__(self, folder: Path, notes: Path) -> None:
        super().__init__(folder)
        self._notes = notes
        self._note("opened")

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        self._note("asked")
        try:
            while not (self._notes / "go").exists():
                await asyncio.sleep(0.01)
            return await super().score(sequence, start, top_k)
        except asyncio.CancelledError:
            self._note("dropped")
            raise

    async def check(self) -> None:
        if (self._notes / str(os.getpid())).exists():
            raise RuntimeError("sick")

    def close(self) -> None:
        self._note("closed")

    def _note(self, event: str) -> None:
        with (self._notes / "events").open("a", encoding="utf-8") as file:
            file.write(f"{event} {os.getpid()}\n")


async def _open(notes: Path, _: EngineKind, folder: Path, __: EngineOptions) -> Engine:
    return WatchedEngine(folder, notes)


def watched(notes: Path) -> Opening:
    """How a replica opens one, whose notes go to this folder."""
    return partial(_open, notes)


def events(notes: Path, event: str) -> Sequence[int]:
    """The processes that wrote this event, in order, one for each time."""
    path = notes / "events"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(f"{event} ")]
