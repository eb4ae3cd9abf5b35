"""Standard output and standard error that cannot end a command: what cannot be written is dropped.

A terminal that is closed, a pipe whose reader has ended and a log on a full disk make every write fail. A run goes on
without its output; a command whose output is its result ends with exit code 1.
"""

import io
import os
import sys
from typing import Any, TextIO


class LossyStream:
    """A text stream that drops everything after the first write that fails.

    Characters that the encoding lacks are written as escapes.
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
        """Send what libraries and child processes write to the same file descriptor nowhere, too."""
        self.lost = True
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # a stream without a descriptor, or no descriptor is left
            pass

    def isatty(self) -> bool:
        return not self.lost and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # encoding, buffer, …


def guard_streams() -> None:
    """Replace standard output and standard error by streams that cannot fail.

    A descriptor that is closed is opened on /dev/null, so that no file of the run takes its number.
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
    """Write what is buffered, and return whether some output of this process was dropped."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, LossyStream)]
    for stream in streams:
        stream.flush()
    return any(stream.lost for stream in streams)
