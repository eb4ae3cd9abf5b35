"""Feed the events of a run to its trackers, each on its own thread.

metrics.jsonl holds every event and is written first. A tracker that fails or is slow during a run neither ends nor
delays the run: its first failure is logged, and at the end the number of events that it missed.
"""

import logging
import math
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from trainer.config import RunConfig
from trainer.errors import TrackingError
from trainer.telemetry.config import TrackingConfig
from trainer.telemetry.jsonl import METRICS_FILE, EventRecord, Listener, iter_metrics, numbers
from trainer.telemetry.trackers import tracker_class
from trainer.telemetry.trackers.base import LogEntry, TrackedRun, Tracker

log = logging.getLogger("tutelage.tracking")
MAX_QUEUED = 10_000  # events queued for one tracker; further events are dropped
CLOSE_TIMEOUT_S = 60.0  # time to write the queued events when a run ends


def check_trackers(config: TrackingConfig) -> None:
    """Raise TrackingError, naming the extra to install, if a package of a configured tracker is not installed."""
    for name in config.enabled:
        missing = [package for package in tracker_class(name).packages if find_spec(package) is None]
        if missing:
            raise TrackingError(f"tracking.{name}: {missing[0]} is not installed: install Tutelage's extra {name}")


@contextmanager
def open_trackers(config: RunConfig, done: int) -> Iterator[list[Listener]]:
    """Open the trackers of a run file and yield a listener for each; close them when the block ends.

    done: steps completed before this start. If a tracker cannot be opened, a new run (done = 0) raises TrackingError;
    a resumed run logs a warning and continues without the tracker.
    """
    run = TrackedRun(config, Path(config.output.dir).expanduser(), done)
    names = config.tracking.enabled
    tokens_seen = _tokens_before(run) if names else None
    with ExitStack() as stack:
        listeners: list[Listener] = []
        for name in names:
            try:
                tracker = tracker_class(name)(run)
            except Exception as error:  # third-party code: any exception is possible
                if not done:
                    raise TrackingError(f"tracking.{name} cannot be opened: {_describe(error)}") from error
                log.warning("tracking.%s cannot be opened: %s; the run continues without it", name, _describe(error))
                continue
            listeners.append(stack.enter_context(_TrackerThread(name, tracker, tokens_seen)).put)
        yield listeners


def _tokens_before(run: TrackedRun) -> float | None:
    """Return the tokens of the steps completed before this start, None if metrics.jsonl does not hold all of them."""
    if run.done == 0:
        return 0.0
    path = run.folder / METRICS_FILE
    tokens: dict[int, float] = {}
    for record in iter_metrics(path) if path.is_file() else ():
        if record["event"] == "start":  # steps after the checkpoint from which the run was resumed are repeated
            tokens = {step: count for step, count in tokens.items() if step <= record["step"]}
        elif record["event"] == "step":
            tokens[record["step"]] = float(record.get("tokens") or math.nan)
    total = sum(tokens.get(step, math.nan) for step in range(1, run.done + 1))
    return None if math.isnan(total) else float(total)


class _TrackerThread:
    """A thread that writes events to one tracker. The run waits for it only when it ends."""

    def __init__(self, name: str, tracker: Tracker, tokens_seen: float | None) -> None:
        self._name = name
        self._tracker = tracker
        self._tokens_seen = tokens_seen
        self._step = 0
        self._queue: queue.Queue[LogEntry | None] = queue.Queue(MAX_QUEUED)
        self._num_received = self._num_written = 0
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name=f"tracking.{name}", daemon=True)

    def __enter__(self) -> "_TrackerThread":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn_once(f"it has not finished {CLOSE_TIMEOUT_S:g} s after the end of the run")
        else:
            self._close(failed=kind is not None)
        if missed := self._num_received - self._num_written:
            log.warning("tracking.%s missed %d events; metrics.jsonl holds them", self._name, missed)

    def _close(self, failed: bool) -> None:
        try:
            self._tracker.close(failed)
        except Exception as error:  # third-party code: any exception is possible
            self._warn_once(_describe(error))

    def put(self, record: EventRecord) -> None:
        """Queue an event for the tracker. Returns at once; a full queue drops the event."""
        entry = self._entry(record)
        if not entry.values and not entry.message:
            return
        self._num_received += 1
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._warn_once(f"{MAX_QUEUED} events are queued")

    def _entry(self, record: EventRecord) -> LogEntry:
        """Convert a record. The tokens seen so far are added to the values, as a second x axis for curves."""
        kind = record["event"]
        self._step = int(record.get("step", self._step))
        values = numbers(record) if kind in ("step", "eval", "rollout_eval") else {}
        if kind == "step" and self._tokens_seen is not None:
            self._tokens_seen += values["tokens"]
        if values and self._tokens_seen is not None:
            values["tokens_seen"] = self._tokens_seen
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return LogEntry(self._step, record["time"], finite, _message(record))

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._tracker.write(entry)
                self._num_written += 1
            except Exception as error:  # third-party code over a network or a disk: any exception is possible
                self._warn_once(_describe(error))

    def _warn_once(self, reason: str) -> None:
        """Log the first failure only: a tracker that fails usually fails for every event."""
        if not self._has_warned:
            self._has_warned = True
            log.warning("tracking.%s fails: %s; the run continues, metrics.jsonl holds every event", self._name, reason)


def _message(record: EventRecord) -> tuple[str, str] | None:
    if not record["event"].startswith("teacher_"):
        return None
    return f"{record['event']} {record['teacher']}", str(record["detail"])


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
