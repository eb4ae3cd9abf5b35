"""A file that must not change after it was opened, so that a sample never changes silently."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainer.errors import DataError

MTIME_STEP_S = 0.02  # the clock of Linux file times advances in steps of at most 10 ms
_Stamp = tuple[int, int]  # size, and time of the last change in nanoseconds


class StableFile:
    """A regular file of at least one byte. `label` names it in errors; default: its path."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self._label = label or str(path)
        with self._open() as file:
            self.stamp = _stamp(os.fstat(file.fileno()))
        if not self.stamp[0]:
            raise DataError(f"{self._label} is empty: expected a file of at least one byte")
        # A write within the same step of the clock can leave size and time unchanged. Wait until the next write is
        # certain to change the time.
        if abs(time.time_ns() - self.stamp[1]) < MTIME_STEP_S * 1e9:
            time.sleep(MTIME_STEP_S)

    @property
    def identity(self) -> tuple[object, ...]:
        """Values that change whenever the content may have changed."""
        return (str(self.path.resolve()), *self.stamp)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file. Check before and after the block that the file is unchanged. Raises DataError."""
        with self._open() as file:
            self._compare(os.fstat(file.fileno()))
            yield file
            self._compare(os.fstat(file.fileno()))

    def check(self) -> None:
        """Raise DataError if the file has changed or cannot be examined."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"cannot read {self._label}: {error.strerror}") from error
        self._compare(status)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb", opener=_open_without_waiting) as file:
                self._check_regular(os.fstat(file.fileno()))
                yield file
        except OSError as error:
            raise DataError(f"cannot read {self._label}: {error.strerror}") from error

    def _check_regular(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{self._label} is not a regular file")

    def _compare(self, status: os.stat_result) -> None:
        self._check_regular(status)
        if (found := _stamp(status)) != self.stamp:
            raise DataError(
                f"{self._label} has changed during the run: expected {_describe(self.stamp)}, found {_describe(found)}"
            )


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that takes the place of the file would block for ever


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns


def _describe(stamp: _Stamp) -> str:
    size, mtime_ns = stamp
    return f"{size} bytes of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(mtime_ns // 10**9))}"
