"""Work on threads beside the event loop and the step, and the CPU seconds that it takes there."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[..., T], *given: Any) -> tuple[T, float]:
    """What `work` returns on one of the loop's threads, and how long it took."""
    return await asyncio.to_thread(timed, work, *given)


async def in_daemon_thread(work: Callable[..., T], *given: Any) -> tuple[T, float]:
    """The same for work that waits for another process, as the other one may for the end of this one.

    Python ends only after the loop's own threads, and so the two would wait for each other.
    """
    future: Future[tuple[T, float]] = Future()
    future.set_running_or_notify_cancel()

    def settle() -> None:
        try:
            future.set_result(timed(work, *given))
        except BaseException as error:  # whatever it is, it is raised where it is awaited
            future.set_exception(error)

    threading.Thread(target=settle, name="waits for others", daemon=True).start()
    return await asyncio.wrap_future(future)


def timed(work: Callable[..., T], *given: Any) -> tuple[T, float]:
    began = time.thread_time()
    result = work(*given)
    return result, time.thread_time() - began
