"""Waiting for the other processes of a run, and failures of the connections to them."""

import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch.distributed import DistError

from trainer.errors import PeerError

log = logging.getLogger("tutelage.distributed")

REPORT_S = 60.0  # a wait that takes longer is reported
REPEAT_S = 600.0  # later waits are reported again
RENDEZVOUS_S = 600.0  # time for all processes to start
RENDEZVOUS_REPORT_S = 10.0
CONNECT_S = 5.0
_GLOO = re.compile(r"gloo/\S*:\d+\] (.*?)(\. |\.?$)", re.MULTILINE)  # messages of its plain RuntimeErrors
_last_warning = float("-inf")
_kept_errors: list[Exception] = []  # their tracebacks hold the tensors of failed collectives, see peer_errors


def reported_wait(rank: int, timeout_s: float, what: str) -> AbstractContextManager[None]:
    """Return a context manager that logs what this process waits for, if its block takes longer than REPORT_S."""
    return _reported(REPORT_S, "process %d has waited %g s for %s", (rank, REPORT_S, what), timeout_s)


@contextmanager
def rendezvous_errors(rank: int, size: int, address: str) -> Iterator[None]:
    """Report a long wait for the other processes, and raise PeerError if they do not come within RENDEZVOUS_S."""
    what = "process %d of %d waits for the other processes at %s"
    try:
        with _reported(RENDEZVOUS_REPORT_S, what, (rank, size, address), RENDEZVOUS_S):
            yield
    except DistError as error:
        raise PeerError(
            f"process {rank} of {size} has not met the other processes at {address} within {RENDEZVOUS_S:g} s "
            f"({_first_line(error)}): start all of them, with the same MASTER_ADDR and MASTER_PORT"
        ) from error


@contextmanager
def _reported(after_s: float, message: str, arguments: tuple[object, ...], timeout_s: float) -> Iterator[None]:
    timer = threading.Timer(after_s, _warn, (f"{message}; it gives up after %g s", *arguments, timeout_s))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _warn(message: str, *arguments: object) -> None:
    """Log a warning, unless one was logged within REPEAT_S."""
    global _last_warning
    if time.monotonic() - _last_warning > REPEAT_S:
        _last_warning = time.monotonic()
        log.warning(message, *arguments)


@contextmanager
def peer_errors(rank: int, size: int) -> Iterator[None]:
    """Raise PeerError instead of an error of torch or gloo that says that another process did not respond.

    The tensors of the failed collective are kept. Otherwise a thread of gloo could release the last reference to one
    while the interpreter ends, which needs the GIL and aborts the process.
    """
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        reason = _peer_reason(error)
        if reason is None:
            raise
        _kept_errors.append(error)
        raise PeerError(
            f"process {rank} of {size} has lost the connection to another process of the run ({reason}): the message "
            "of the process that ended first names the cause"
        ) from error


def await_first_process(address: str, port: int, rank: int, size: int) -> None:
    """Wait until process 0 listens. Raises PeerError after RENDEZVOUS_S.

    torch would wait silently, and then print C++ stacks.
    """
    began, reported, reason = time.monotonic(), False, ""
    while (waited_s := time.monotonic() - began) < RENDEZVOUS_S:
        try:
            socket.create_connection((address, port), CONNECT_S).close()
            return
        except OSError as error:  # not started yet, or a name that does not resolve yet
            reason = error.strerror or str(error)
        if not reported and waited_s > RENDEZVOUS_REPORT_S:
            log.warning(
                "process %d of %d waits for process 0 at %s:%d (%s); it gives up after %g s",
                *(rank, size, address, port, reason, RENDEZVOUS_S),
            )
            reported = True
        time.sleep(min(1.0, RENDEZVOUS_S / 10))
    raise PeerError(
        f"process {rank} of {size} has not reached process 0 at {address}:{port} within {RENDEZVOUS_S:g} s ({reason}): "
        "start all processes of the run, and set MASTER_ADDR and MASTER_PORT to the address of process 0"
    )


def _peer_reason(error: BaseException | None) -> str | None:
    """Return the reason in an error of torch or gloo, or in the cause of an error; None for other errors."""
    while error is not None:
        if gloo := _GLOO.search(str(error)):
            return gloo[1]
        if isinstance(error, DistError):
            return _first_line(error)
        error = error.__cause__
    return None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
