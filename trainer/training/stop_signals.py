"""Handling of SIGTERM and SIGHUP: the run saves its state and ends, and --resume continues it.

A terminal sends SIGHUP when it is closed. A process that was started with nohup ignores SIGHUP and continues.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
StopSource = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Context manager that calls a function when the run should save its state and end. The function is reentrant."""

_last: signal.Signals = signal.SIGTERM


@contextmanager
def on_stop_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` on a stop signal inside the block. Do nothing outside the main thread. A StopSource."""
    if not _in_main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        global _last
        _last = signal.Signals(number)
        callback()

    handled = [each for each in STOP_SIGNALS if each is signal.SIGTERM or signal.getsignal(each) is not signal.SIG_IGN]
    previous = [(each, signal.signal(each, handle)) for each in handled]
    try:
        yield
    finally:
        for each, handler in previous:
            signal.signal(each, handler)


def stopped_exit_code() -> int:
    """Return the exit code of a run that a signal has stopped: 128 and the number of the last stop signal.

    A process that stopped because another process of the run received the signal counts as stopped by SIGTERM.
    """
    return 128 + _last


@contextmanager
def sighup_ignored() -> Iterator[None]:
    """Ignore SIGHUP inside the block, so that processes started there ignore it for their whole life."""
    if not _in_main_thread():
        yield
        return
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
