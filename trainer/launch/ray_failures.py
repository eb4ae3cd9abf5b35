"""Failures of the workers of a run on Ray, from the error in a worker to the sentence of the driver."""

import logging
import traceback

from trainer.errors import PeerError, RunInUse
from trainer.launch.failures import ONE_SENTENCE, is_permanent
from trainer.plain_text import one_line

log = logging.getLogger("tutelage.launch")


class WorkerFailure(Exception):
    """Raised in a worker instead of the original error, which may not be picklable.

    sentence   what happened
    permanent  whether a restart would fail again
    of_peer    whether another worker failed first
    details    traceback of a bug; empty if the sentence is sufficient
    """

    def __init__(self, sentence: str, permanent: bool = False, of_peer: bool = False, details: str = "") -> None:
        super().__init__(sentence, permanent, of_peer, details)
        self.sentence = sentence
        self.permanent = permanent
        self.of_peer = of_peer
        self.details = details


def as_worker_failure(error: Exception) -> WorkerFailure:
    """Return the failure that a worker reports for an error.

    A run in use is not permanent: a killed worker may still hold the lock, and the driver has checked it at the start.
    """
    if isinstance(error, ONE_SENTENCE):
        permanent = is_permanent(error) and not isinstance(error, RunInUse)
        return WorkerFailure(one_line(str(error)), permanent, isinstance(error, PeerError))
    return WorkerFailure(one_line(f"{type(error).__name__}: {error}"), details=traceback.format_exc())


def explain(error: Exception) -> WorkerFailure:
    """Return the failure that explains an error of Ray Train: permanent before transient, and peers last.

    Tracebacks of bugs are logged.
    """
    by_rank: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not by_rank:
        cause = getattr(error, "controller_failure", error)
        return WorkerFailure(f"Ray could not start or watch the workers: {_first_line(cause)}")
    failures = [_of_rank(rank, cause) for rank, cause in sorted(by_rank.items())]
    for failure in failures:
        if failure.details:
            log.error("%s", failure.details)
    return max(failures, key=lambda failure: (failure.permanent, not failure.of_peer))


def _of_rank(rank: int, cause: Exception) -> WorkerFailure:
    if not isinstance(cause, WorkerFailure):  # an error of Ray: the process has ended or does not respond
        return WorkerFailure(f"worker {rank} failed: {_first_line(cause)}")
    prefix = "" if cause.permanent else f"worker {rank} failed: "
    return WorkerFailure(prefix + cause.sentence, cause.permanent, cause.of_peer, cause.details)


def _first_line(error: BaseException) -> str:
    return one_line(next(iter(str(error).splitlines()), "") or type(error).__name__)
