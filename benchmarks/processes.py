"""Server processes for benchmarks, on loopback.

This module imports little, because its imports count in the memory of the measured servers.
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
def server_process(serve: Callable[..., None], *arguments: Any) -> Iterator[str]:
    """Run serve(*arguments, port) in a process within the block. Yields its address.

    Raises RuntimeError if the server is not ready within START_S.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(*arguments, port), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(url):
            if not process.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"{serve.__name__}{arguments} did not start: see its message above")
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
