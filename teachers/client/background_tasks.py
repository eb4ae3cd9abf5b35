"""Run background tasks in an event loop, log their unexpected errors, and cancel them together."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("tutelage.pool")


class BackgroundTasks:
    """The background tasks of one subject. Log messages contain the name of the subject."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a coroutine as a background task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._finish)

    async def aclose(self) -> None:
        """Cancel all tasks and wait for their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task for %s failed unexpectedly", self._subject, exc_info=error)
