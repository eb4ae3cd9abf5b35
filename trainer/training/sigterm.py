"""Handling of SIGTERM: the run saves its state and ends, and --resume continues it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_sigterm(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` on SIGTERM inside the block. Do nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: callback())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
