"""Processes that tests start and end."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def started(command: list[str], log: Path | None = None) -> Iterator[psutil.Popen]:
    """Run a process within the block, and write its stderr to `log`. Kill it and its descendants at the end."""
    with open(log or "/dev/null", "w", encoding="utf-8") as file:
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
        process.wait()
