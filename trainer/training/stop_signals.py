"""Handling of SIGTERM and SIGHUP: the run saves its state and ends, and --resume continues it.

A terminal sends SIGHUP when it is closed. A process that was started with nohup ignores SIGHUP and continues.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def on_stop_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` on a stop signal inside the block. Do nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [each for each in STOP_SIGNALS if each is signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN]
    previous = [(each, signal.signal(each, lambda *_: callback())) for each in handled]
    try:
        yield
    finally:
        for each, handler in previous:
            signal.signal(each, handler)


def treat_sighup_as_sigterm() -> None:
    """Convert SIGHUP into SIGTERM, unless SIGHUP is ignored. Ray handles only SIGTERM and then stops its workers."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
