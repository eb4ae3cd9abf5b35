"""Standard output and standard error whose write errors do not end a command.

Writes fail after the terminal is closed, after the reader of a pipe has ended, and if the disk of a log is full. A run
continues without output. A command whose output is its result ends with exit code 1.
"""

import io
import os
import sys
from typing import Any, TextIO


class LossyStream:
    """Text stream that discards all output after the first failed write.

    Characters that the encoding cannot represent are written as escape sequences.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = False
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            if not self.lost:
                self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._lose()
        return len(text)

    def flush(self) -> None:
        try:
            if not self.lost:
                self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Redirect the file descriptor to /dev/null, for libraries and child processes that write to it directly."""
        self.lost = True
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # a stream without a descriptor, or no descriptor is left
            pass

    def isatty(self) -> bool:
        return not self.lost and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # encoding, buffer, …


def guard_streams() -> None:
    """Replace standard output and standard error by LossyStream.

    A closed standard descriptor is opened on /dev/null. Otherwise the next opened file would receive its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the rest of the process
        if not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))


def output_is_lost() -> bool:
    """Flush both streams, and return whether any output was discarded."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, LossyStream)]
    for stream in streams:
        stream.flush()
    return any(stream.lost for stream in streams)
