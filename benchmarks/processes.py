"""Servers that benchmarks ask: processes of their own on loopback, ready when a block begins and gone when it ends.

It imports little: what is imported here counts in the memory of the servers that are measured.
"""

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

START_S = 300.0


@contextmanager
def server_process(serve: Callable[..., None], *given: Any) -> Iterator[str]:
    """The address of a process that does serve(*given, port). Raises RuntimeError if it is not ready in START_S."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(*given, port), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(url):
            if not process.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"{serve.__name__}{given} did not start: its own message is above")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.join()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).is_success
    except httpx.TransportError:
        return False
