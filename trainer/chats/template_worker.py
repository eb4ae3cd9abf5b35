"""Render chat templates in a subprocess with limits of memory, time and output.

A template is a program, and the template of a teacher is untrusted: it can loop forever, recurse, or produce unbounded
output. Exceeding a limit is an error of the rendered chat; the subprocess is restarted if necessary. Each process that
renders has one subprocess, which its threads share.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from trainer.chats.template_process import LENGTH

RENDER_S = 10.0  # a render takes about a millisecond
START_S = 60.0
MAX_GROWTH = 64  # characters of a text per character of its request, and
MAX_CHARS = 1 << 20  # so many more
_SCRIPT = Path(__file__).with_name("template_process.py")


class RenderError(Exception):
    """Raised if a template raises an error or exceeds a limit. The message continues "the chat template …"."""


class LimitError(RenderError):
    """Raised if the subprocess takes too long or ends. The template may render other chats."""


class TemplateWorker:
    """Handle of the subprocess. It is started at the first rendering, and again after it has ended or after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._of_parents: list[subprocess.Popen[bytes]] = []
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def render(self, request: Mapping[str, Any]) -> str:
        """Render {"source", "messages", "tools", "variables", "today"} as text. Raises RenderError or LimitError."""
        try:
            data = json.dumps(request)
            data = f'{data[:-1]}, "max_chars": {MAX_CHARS + MAX_GROWTH * len(data)}}}'
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"cannot receive the chat ({type(error).__name__}: {error})") from error
        with self._lock:
            response = self._exchange(data.encode())
        if "error" in response:
            raise RenderError(f"raised {response['error']}")
        return str(response["text"])

    def close(self) -> None:
        """End the subprocess. The next rendering starts a new one."""
        with self._lock:
            self._end()

    def _exchange(self, data: bytes) -> dict[str, Any]:
        """Send one request and return its response. Every failure ends the subprocess."""
        try:
            process = self._process if self._process is not None else self._start()
            assert process.stdin is not None
            process.stdin.write(LENGTH.pack(len(data)) + data)
            process.stdin.flush()
            response: dict[str, Any] = json.loads(_receive(process.stdout, RENDER_S))
        except (OSError, EOFError, TimeoutError) as error:
            self._end()
            ended = "ended the process that renders, which has limits of memory and time"
            raise LimitError(f"took more than {RENDER_S:g} s" if isinstance(error, TimeoutError) else ended) from error
        except BaseException:  # an interrupted exchange would leave its response to the next request
            self._end()
            raise
        if response.get("error", "").startswith(("MemoryError", "RecursionError")):
            self._end()  # its memory may be used up
        return response

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        _receive(self._process.stdout, START_S)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # a request that the process did not read
                pass

    def _forget(self) -> None:
        """Forget the subprocess in the child process after a fork, because it belongs to the parent."""
        self._lock = threading.Lock()  # another thread may have held it at the fork
        if self._process is not None:
            self._of_parents.append(self._process)
            self._process = None


def _receive(stream: IO[bytes] | None, timeout_s: float) -> bytes:
    """Read one message. Raises TimeoutError, and EOFError if the subprocess has ended."""
    assert stream is not None
    deadline = time.monotonic() + timeout_s
    (length,) = LENGTH.unpack(_read(stream.fileno(), LENGTH.size, deadline))
    return _read(stream.fileno(), length, deadline)


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    """Read `size` bytes before `deadline`, from the file descriptor: `poll` does not see buffered bytes."""
    data = bytearray()
    poll = select.poll()  # unlike select, it takes descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    while len(data) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise TimeoutError
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


WORKER = TemplateWorker()
