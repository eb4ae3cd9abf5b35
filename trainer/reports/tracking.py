"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each fed on a thread of its own.

metrics.jsonl holds everything and is written first. A tracker that fails or is slow while a run goes on neither ends
nor delays the run: its first failure is said, and at the end how many events it has missed.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from trainer.config import RunConfig, TrackingConfig
from trainer.errors import TrackingError
from trainer.reports.history import FILE, read_history
from trainer.reports.metrics import Event, Listener, numbers
from trainer.reports.trackers import PACKAGES, TRACKERS, Point, Tracked, Tracker

log = logging.getLogger("tutelage.tracking")
MOST_WAITING = 10_000  # events that wait for one tracker; a later one is missed
CLOSE_S = 60.0  # time for those that still wait when a run ends


def check_trackers(config: TrackingConfig) -> None:
    """Raises TrackingError, naming the extra to install, if a package that the run file needs is not there."""
    for key in PACKAGES:
        missing = [package for package in PACKAGES[key] if getattr(config, key) and find_spec(package) is None]
        if missing:
            raise TrackingError(f"tracking.{key}: {missing[0]} is not installed: install Tutelage's extra {key}")


@contextmanager
def tracked(config: RunConfig, done: int) -> Iterator[list[Listener]]:
    """Listeners that hand a run's events to the trackers of its run file, until the block ends.

    Raises TrackingError if one cannot be opened and no step has been done; a run that goes on (done > 0) goes on
    without it, and says so.
    """
    run = Tracked(config, Path(config.output.dir).expanduser(), done)
    wanted = [key for key in PACKAGES if getattr(config.tracking, key)]
    tokens = _tokens_before(run) if wanted else None
    with ExitStack() as stack:
        listeners: list[Listener] = []
        for key in wanted:
            try:
                tracker = TRACKERS[key](run)
            except Exception as error:  # somebody else's program: it may raise anything
                if not done:
                    raise TrackingError(f"tracking.{key} cannot be opened: {_reason(error)}") from error
                log.warning("tracking.%s cannot be opened: %s; the run goes on without it", key, _reason(error))
                continue
            listeners.append(stack.enter_context(_Feed(key, tracker, tokens)).hear)
        yield listeners


def _tokens_before(run: Tracked) -> float | None:
    """Tokens seen in the steps that were done before; None if metrics.jsonl does not hold them all."""
    if run.done == 0:
        return 0.0
    if not (run.folder / FILE).is_file():
        return None
    history = read_history(run.folder)
    if history.tokens is None or len(history.tokens) < run.done:
        return None
    return float(history.tokens[run.done - 1])


class _Feed:
    """Feeds one tracker on a thread of its own: whatever the tracker raises, and however long it takes."""

    def __init__(self, name: str, tracker: Tracker, tokens_seen: float | None) -> None:
        self._name = name
        self._tracker = tracker
        self._tokens_seen = tokens_seen
        self._step = 0
        self._waiting: queue.Queue[Point | None] = queue.Queue(MOST_WAITING)
        self._num_heard = self._num_written = 0
        self._said = False
        self._thread = threading.Thread(target=self._work, name=f"tracking.{name}", daemon=True)

    def __enter__(self) -> "_Feed":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._say(f"it is not done {CLOSE_S:g} s after the run")
        else:
            self._close(failed=kind is not None)
        if missed := self._num_heard - self._num_written:
            log.warning("tracking.%s has missed %d events; metrics.jsonl holds them", self._name, missed)

    def _close(self, failed: bool) -> None:
        try:
            self._tracker.close(failed)
        except Exception as error:  # as in _work
            self._say(_reason(error))

    def hear(self, event: Event) -> None:
        """Take an event to be written; returns at once."""
        self._step = int(event.get("step", self._step))
        figures = numbers(event) if event["event"] in ("step", "eval") else {}
        if event["event"] == "step" and self._tokens_seen is not None:
            self._tokens_seen += figures["tokens"]
        if figures and self._tokens_seen is not None:
            figures["tokens_seen"] = self._tokens_seen
        figures = {name: value for name, value in figures.items() if value == value}  # NaN: there is no figure
        point = Point(self._step, event["time"], figures, _words(event))
        if not figures and not point.words:
            return
        self._num_heard += 1
        try:
            self._waiting.put_nowait(point)
        except queue.Full:
            self._say(f"{MOST_WAITING} events wait for it")

    def _work(self) -> None:
        while (point := self._waiting.get()) is not None:
            try:
                self._tracker.write(point)
                self._num_written += 1
            except Exception as error:  # somebody else's program over a network or a disk: it may raise anything
                self._say(_reason(error))

    def _say(self, why: str) -> None:
        """The first failure, loudly."""
        if not self._said:
            self._said = True
            log.warning("tracking.%s fails: %s; the run goes on, metrics.jsonl holds everything", self._name, why)


def _words(event: Event) -> tuple[str, str] | None:
    if not event["event"].startswith("teacher_"):
        return None
    return f"{event['event']} {event['teacher']}", str(event["detail"])


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
