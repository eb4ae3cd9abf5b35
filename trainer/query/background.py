"""Run functions on background threads, for the event loop, and measure their CPU time."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    """Run `function` on one of the event loop's threads. Return its result and its CPU seconds."""
    return await asyncio.to_thread(_timed, function, *args)


async def in_daemon_thread(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    """Run `function`, which may wait for another process, on a daemon thread. Return its result and CPU seconds.

    The interpreter joins the event loop's own threads when it exits. Two processes that wait for each other on such
    threads would never exit.
    """
    future: Future[tuple[T, float]] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(_timed(function, *args))
        except BaseException as error:  # raised where the future is awaited
            future.set_exception(error)

    threading.Thread(target=run, name="fusion", daemon=True).start()
    return await asyncio.wrap_future(future)


def _timed(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    began = time.thread_time()
    result = function(*args)
    return result, time.thread_time() - began
