"""An engine for replicas on Ray that records its events in a folder."""

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from teachers.engines.base import Engine
from teachers.engines.options import EngineOptions
from teachers.protocol.rows import Rows
from teachers.server.ray_serve import EngineFactory
from tests.serve import FormulaEngine


class WatchedEngine(FormulaEngine):
    """Return rows once `folder` has a file "go". The check fails while a file named by the process id exists there."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__(model)
        self._folder = folder
        self._record("opened")

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        self._record("started")
        try:
            while not (self._folder / "go").exists():
                await asyncio.sleep(0.01)
            return await super().score(sequence, start, top_k)
        except asyncio.CancelledError:
            self._record("cancelled")
            raise

    async def check(self) -> None:
        if (self._folder / str(os.getpid())).exists():
            raise RuntimeError("broken")

    def close(self) -> None:
        self._record("closed")

    def _record(self, event: str) -> None:
        with (self._folder / "events").open("a", encoding="utf-8") as file:
            file.write(f"{event} {os.getpid()}\n")


async def _open(folder: Path, _: EngineOptions, model: Path) -> Engine:
    return WatchedEngine(model, folder)


def watched(folder: Path) -> EngineFactory:
    """Return a factory of engines that record their events in `folder`."""
    return partial(_open, folder)


def events(folder: Path, event: str) -> Sequence[int]:
    """Return the id of the process of every event with this name, in order."""
    path = folder / "events"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(f"{event} ")]
